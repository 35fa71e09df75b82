"""To Code, or Not To Code, Table 2: code only, from scratch; see text.py."""

from config.tocode.text import *

mix = streams(code=1)
