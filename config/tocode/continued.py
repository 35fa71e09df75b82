"""To Code, or Not To Code, Table 2: continued on text, a tenth of it code so that nothing is abrupt; see text.py."""

from config.tocode.text import *

mix = streams(code=0.1)
