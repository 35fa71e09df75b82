"""To Code, or Not To Code: the cooldown without code; see text.py."""

from config.tocode.cooldown import *

mix = streams(code=0)
