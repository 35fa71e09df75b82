"""Crystal 7B, phase 3 of 3: adaptation to Python and the web, re-warmed to a sixth of the peak.

27,728 steps, 119.9B tokens: three epochs of four languages and a replay of the rest. Crystal replayed the first tenth
of six SlimPajama parts; here the replay begins their second epoch, in a new order. 30% of the four languages
and 90% of the rest of the code are trained as fill-in-the-middle.
"""

from config.crystal7b.phase1 import *
from config.crystal7b.phase1 import _steps

share = _steps["phase3"] / sum(_steps.values())
mix = {
    "slimpajama_commoncrawl": 0.05828,
    "slimpajama_c4": 0.01686,
    "slimpajama_arxiv": 0.01666,
    "slimpajama_books": 0.00831,
    "slimpajama_wikipedia": 0.05836,
    "slimpajama_stackexchange": 0.00838,
    "starcoderdata": 0.03344,
    "starcoder_python": 0.34270,
    "starcoder_html": 0.18537,
    "starcoder_javascript": 0.18371,
    "starcoder_css": 0.08793,
}
objective = {"starcoderdata": fim(0.9)}
objective |= {f"starcoder_{name}": fim(0.3) for name in ("python", "html", "javascript", "css")}
lr = 0.002
warmup = 276
lr_end = 0.0002
save_every = 1000
