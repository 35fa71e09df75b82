"""Crystal 7B, phase 1 of 3: language first. 79,721 steps, 344.8B tokens (arXiv 2411.04156; released configuration).

    python train.py config/crystal7b/phase1.py config/crystal7b/phase2.py config/crystal7b/phase3.py --plan

shows the whole run, 1,392.1B tokens, without the data: `source_tokens` stands in for what is not on the disk.
SlimPajama is 690B tokens with Crystal's tokenizer. Crystal gave phase 1 the even packed files and phase 2 the odd ones;
here phase 2 simply goes on where phase 1 stopped in every source, which is the same disjoint halves without two copies.
"""

out = "out/crystal7b"
data = "data/crystal"
size = "7B"

_steps = {"phase1": 79_721, "phase2": 214_387, "phase3": 27_728}
batch = 2112 * 2048  # 4,325,376 tokens a step, constant
budget = sum(_steps.values()) * batch
share = _steps["phase1"] / sum(_steps.values())

mix = {
    "slimpajama_commoncrawl": 0.53346,
    "slimpajama_c4": 0.26650,
    "slimpajama_github": 0.04963,
    "slimpajama_arxiv": 0.04325,
    "slimpajama_books": 0.04131,
    "slimpajama_wikipedia": 0.03417,
    "slimpajama_stackexchange": 0.03168,
}
# SlimPajama's parts are what phases 1 and 2 use up in one epoch, StarCoderData is half of what phase 2 draws, the four
# languages a third of what phase 3 draws.
source_tokens = {
    "slimpajama_commoncrawl": 367.9e9,
    "slimpajama_c4": 183.8e9,
    "slimpajama_github": 34.2e9,
    "slimpajama_arxiv": 29.8e9,
    "slimpajama_books": 28.4e9,
    "slimpajama_wikipedia": 23.6e9,
    "slimpajama_stackexchange": 21.8e9,
    "starcoderdata": 291.25e9,
    "starcoder_python": 13.7e9,
    "starcoder_html": 7.4e9,
    "starcoder_javascript": 7.34e9,
    "starcoder_css": 3.51e9,
}

# Phases 1 and 2 are one straight line from 0.012 towards 0.00012408 at step 294,337 + 86, cut at the end of phase 1.
_start, _end, _line = 0.012, 0.00012408, 294_337
lr = _start
warmup = 86  # steps
lr_end = _start - (_start - _end) * (_steps["phase1"] - warmup) / _line
decay = "linear"
beta1, beta2, eps, weight_decay, clip = 0.9, 0.95, 1e-9, 0.1, 1.0

save_every = 1500
eval_every = 1500

# Not run here. Differences from Crystal that this file does not hide: a byte-level BPE instead of LLaMA's SentencePiece
# (with its own number of ids, set vocab_size = 0), half-split instead of adjacent-pair rotary channels (a permutation).
