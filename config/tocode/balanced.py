"""To Code, or Not To Code, Table 2: half text, half code, from scratch; see text.py."""

from config.tocode.text import *

mix = streams(code=0.5)
