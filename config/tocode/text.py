r"""To Code, or Not To Code (arXiv 2408.10914), Table 2: text only. And what all of its phases share, at laptop size.

python train.py config/tocode/text.py --share=0.909                                             # text-only
python train.py config/tocode/balanced.py --share=0.909                                         # balanced-only
python train.py config/tocode/balanced.py config/tocode/continued.py config/tocode/cooldown.py  # balanced -> text
python train.py config/tocode/code.py config/tocode/continued.py config/tocode/cooldown.py      # code -> text
python train.py config/tocode/cooldown.py --init_from=out/text                                  # after text-only

Budgets are 5 : 5 : 1, as the paper's 200B, 200B and 40B; text-only and balanced-only take both fives in one phase. Each
phase has its own cosine with warmup, from Adam's moments at zero (rewarm, reset). To continue one cosine, and carry:

python train.py config/tocode/code.py --decay_part="[0, 0.5]"
python train.py config/tocode/continued.py --decay_part="[0.5, 1]" --warmup=0 --carry_optimizer=True \
    --init_from=out/code

The paper does not say which it did, nor its peak rate, floor, positions or norm: these are ours.
"""

size = "nano"
budget = 11e6
share = 5 / 11
batch = 4096 if size == "nano" else 0  # 0: the size's own
parallel = True  # attention and MLP of one norm, summed
rotary = 1.0
decay = "cosine"
lr_peak = 0.006
lr = lr_peak
lr_end = 0.1 * lr_peak
warmup = 0.028  # the paper's 1,325 of 47,684 steps

# What the two streams are made of, {source: share of the stream}. The paper's code is 80% web code and 20% markup.
_text = {"text": 1.0}
_code = {"code": 1.0}


def streams(code):
    """The mixture whose code stream has a share."""
    parts = {name: (1 - code) * part for name, part in _text.items()} | {n: code * part for n, part in _code.items()}
    return {name: round(weight, 6) for name, weight in parts.items() if weight}


mix = streams(code=0)
