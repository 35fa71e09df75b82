"""What convert.py promises: other programs' arithmetic on the folders it writes and reads gives our numbers.

`pip install transformers` turns on what is compared with transformers itself.
"""

import itertools
import json
import os
import random
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import regex
import torch
import torch.nn.functional as F

import checkpoint
import convert
import tokenizer
import train
from conftest import ROOT, losses, run
from model import GPT, PRESETS, GPTConfig, init_weights
from sample import load_model

ENCODING = tokenizer.load(vocab_size=512)
ABOUT = {"name": "nanocrystal", "vocab_size": 512, "sha256": tokenizer.digest(ENCODING)}  # in checkpoints
SMALL = dict(n_layer=2, n_head=2, n_embd=64, block_size=32, vocab_size=640, vocab_real=512)
TEXTS = [
    (ROOT / "mix.py").read_text()[:3000],
    "naïve don't 12345\r\n\n  <|endoftext|> \x85 'ſ 日本\u3000語",
    "",
    " ",
    "a",
]


def random_model(**knobs):
    """A GPT none of whose numbers is 0 or 1, in float64."""
    model = GPT(GPTConfig(**SMALL | knobs), torch.float64).eval()
    init_weights(model, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model


def saved(model, folder):
    """A checkpoint of a model, as train.py leaves one."""
    state = {"step": 7, "phase": "p", "tokens": 7, "sample": 7, "start": {}, "first_token": 0, "drawn": {},
             "mix": {"sources": {}}, "model": vars(model.config), "tokenizer": ABOUT,
             "config": {"data": "data", "mix": {}, "objective": {}}}  # fmt: skip
    tensors = {"model": {name: p.detach() for name, p in model.named_parameters()}}
    checkpoint.save(folder / "checkpoints", 7, tensors, state, keep=1)
    return folder


def log_probabilities(model, tokens):
    with torch.no_grad():
        return model(tokens).log_softmax(-1)


def assert_same(a, b):
    torch.testing.assert_close(a.double(), b.double(), atol=1e-5, rtol=1e-5)


@pytest.fixture
def tokens():
    return torch.randint(512, (3, 32), generator=torch.Generator().manual_seed(3))


# -------------------------------------------------------------------- the others' arithmetic, written down once more


def read(path):
    """safetensors, without our reader."""
    data = path.read_bytes()
    size = int(np.frombuffer(data, "<u8", 1)[0])
    header, found = json.loads(data[8 : 8 + size]), {}
    for name, about in header.items():
        if name != "__metadata__":
            begin, end = about["data_offsets"]
            array = np.frombuffer(data[8 + size + begin : 8 + size + end], {"F32": "<f4", "F16": "<f2"}[about["dtype"]])
            found[name] = torch.from_numpy(array.astype(np.float64)).reshape(about["shape"])
    return found


def attend(q, k, v, scale):
    T = q.shape[-2]
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    return ((q @ k.mT) * scale).masked_fill(future, -torch.inf).softmax(-1) @ v


def turn(x, R, neighbours):
    """Rotary positions as complex numbers: x (B, H, T, D), its first R channels."""
    angle = torch.outer(torch.arange(x.shape[2]).double(), 10000.0 ** (-torch.arange(0, R, 2).double() / R))
    pairs = x[..., :R].unflatten(-1, (-1, 2)) if neighbours else x[..., :R].unflatten(-1, (2, -1)).transpose(-1, -2)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angle), angle))
    turned = turned if neighbours else turned.transpose(-1, -2)
    return torch.cat((turned.flatten(-2), x[..., R:]), dim=-1)


def hugging_face(config, w, tokens):
    """Log-probabilities (B, T, V) of LlamaForCausalLM and StableLmForCausalLM in float64."""
    llama, H = config["model_type"] == "llama", config["num_attention_heads"]
    D = config["hidden_size"] // H
    R = D if llama else int(D * config["rope_parameters"]["partial_rotary_factor"])

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(x, name):
        if llama:
            return x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * w[f"{name}.weight"]
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], config["layer_norm_eps"])

    x = w["model.embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        y = norm(x, at + "input_layernorm")
        q, k, v = (linear(y, f"{at}self_attn.{n}_proj").unflatten(-1, (-1, D)).transpose(1, 2) for n in "qkv")
        k, v = (part.repeat_interleave(H // part.shape[1], dim=1) for part in (k, v))
        a = attend(turn(q, R, False), turn(k, R, False), v, D**-0.5).transpose(1, 2).flatten(2)
        a = linear(a, at + "self_attn.o_proj")
        if not config.get("use_parallel_residual"):
            x = x + a
            y = norm(x, at + "post_attention_layernorm")
        m = linear(F.silu(linear(y, at + "mlp.gate_proj")) * linear(y, at + "mlp.up_proj"), at + "mlp.down_proj")
        x = x + a + m if config.get("use_parallel_residual") else x + m
    head = w["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return (norm(x, "model.norm") @ head.T).log_softmax(-1)


def crystal(config, w, tokens):
    """Log-probabilities (B, T, V) of LLM360's CrystalCoderLMHeadModel in float64, from its released code's description:
    GPT-2 with rotary pairs of neighbours, products divided by head_dim, fc * silu(fc2), and BTLM's factors."""
    H, D, R = config["n_head"], config["n_embd"] // config["n_head"], config["rotary_dim"]

    def linear(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], config["layer_norm_epsilon"])

    x = w["transformer.wte.weight"][tokens] * config["mup_embeddings_scale"]
    for i in range(config["n_layer"]):
        at = f"transformer.h.{i}."
        q, k, v = linear(norm(x, at + "ln_1"), at + "attn.c_attn").unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
        a = attend(turn(q, R, True), turn(k, R, True), v, 1 / D).transpose(1, 2).flatten(2)
        x = x + linear(a, at + "attn.c_proj")
        y = norm(x, at + "ln_2")
        x = x + linear(linear(y, at + "mlp.c_fc") * F.silu(linear(y, at + "mlp.c_fc2")), at + "mlp.c_proj")
    scale = config["mup_output_alpha"] * config["mup_width_scale"]
    return (norm(x, "transformer.ln_f") @ w["transformer.wte.weight"].T * scale).log_softmax(-1)


# ----------------------------------------------------------------------------------------------------------------- out

STABLELM, LLAMA = {}, {"norm": "rmsnorm", "rotary": 1.0}
VARIANTS = {
    "crystal's": STABLELM,
    "wider than muP's base": {"mup_base": 16, "rotary": 0.5},
    "without muP, tied": {"mup_base": 0},
    "untied, all channels turn": {"tie": False, "rotary": 1.0},
    "parallel": {"parallel": True, "mup_base": 0, "tie": False},
    "llama's": LLAMA | {"tie": False, "mup_base": 0},
    "llama with muP and biases": LLAMA | {"bias": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_exported_computes_what_the_model_does_and_comes_back(name, tokens, tmp_path):
    model = random_model(**VARIANTS[name])
    assert convert.main([str(saved(model, tmp_path / "out")), str(tmp_path / "hf")]) == 0
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["vocab_size"] == 512  # padding of the vocabulary is gone
    ours, weights = log_probabilities(model, tokens), read(tmp_path / "hf/model.safetensors")
    assert_same(hugging_face(config, weights, tokens), ours)
    assert convert.main([str(tmp_path / "hf"), str(tmp_path / "back")]) == 0
    back, encoding, _ = load_model(tmp_path / "back", dtype=torch.float64)
    assert_same(log_probabilities(back, tokens), ours)
    assert tokenizer.digest(encoding) == tokenizer.digest(ENCODING)
    assert convert.main([str(tmp_path / "back"), str(tmp_path / "again"), "--dtype=float16"]) == 0
    halves = read(tmp_path / "again/model.safetensors")
    assert halves.keys() == weights.keys()
    assert all(torch.equal(halves[key], weights[key].half().double()) for key in weights)


def test_biases_that_stablelm_has_are_exported_and_others_refused(tokens, tmp_path, capsys):
    model = random_model(bias=True)
    assert convert.main([str(saved(model, tmp_path / "out")), str(tmp_path / "hf")]) == 2
    assert "StableLmForCausalLM has no place for blocks.0.attn_out.bias" in capsys.readouterr().err
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("attn_out.bias", "gate_up.bias", "mlp_out.bias")):
                p.zero_()
    assert convert.main([str(saved(model, tmp_path / "out2")), str(tmp_path / "hf")]) == 0
    config = json.loads((tmp_path / "hf/config.json").read_text())
    theirs = hugging_face(config, read(tmp_path / "hf/model.safetensors"), tokens)
    assert_same(theirs, log_probabilities(model, tokens))


def by_merges(files, text):
    """Ids of a text by the rules of tokenizer.json, merge by merge."""
    model, (split, _) = files["model"], files["pre_tokenizer"]["pretokenizers"]
    order = {tuple(pair): i for i, pair in enumerate(model["merges"])}
    letters, ids = tokenizer.byte_characters(), []
    for word in regex.findall(split["pattern"]["Regex"], text):
        pieces = [letters[byte] for byte in word.encode()]
        while pairs := [(order[pair], i) for i, pair in enumerate(itertools.pairwise(pieces)) if pair in order]:
            _, i = min(pairs)
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
        ids += [model["vocab"][piece] for piece in pieces]
    return ids


def test_the_exported_tokenizer_gives_the_same_ids():
    for encoding in (ENCODING, tokenizer.load(vocab_size=8192)):
        files = convert.tokenizer_files(encoding, 32)["tokenizer.json"]
        for text in TEXTS:
            assert by_merges(files, text) == encoding.encode_ordinary(text)
        assert {t["content"]: t["id"] for t in files["added_tokens"]} == encoding._special_tokens


# ------------------------------------------------------------------------------------------------------------------ in


def write_parts(folder, name, tensors, write):
    """Tensors in two files and an index of them."""
    stem, suffix = name.split(".")
    keys = {f"{stem}-0000{n + 1}-of-00002.{suffix}": [*tensors][n::2] for n in range(2)}
    for file, some in keys.items():
        write(folder / file, {key: tensors[key] for key in some})
    index = {"weight_map": {key: file for file, some in keys.items() for key in some}}
    (folder / f"{name}.index.json").write_text(json.dumps(index))


def crystal_folder(folder, **changes):
    """As LLM360 released it, at a small size: two pytorch_model parts, an index, tables, a copy of the head."""
    config = {
        "model_type": "crystalcoder", "n_layer": 2, "n_head": 2, "n_embd": 64, "n_inner": 170, "n_positions": 32,
        "vocab_size": 544, "rotary_dim": 8, "position_embedding_type": "rotary", "activation_function": "swiglu",
        "layer_norm_epsilon": 1e-5, "mup_embeddings_scale": 14.6, "mup_output_alpha": 2.22, "mup_width_scale": 0.25,
        "mup_scale_qk_dot_by_d": True, "scale_attn_weights": True, "tie_word_embeddings": True,
    } | changes  # fmt: skip
    generator = torch.Generator().manual_seed(4)
    C, M = config["n_embd"], config["n_inner"]
    shapes = {"transformer.wte.weight": (544, C), "transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,)}
    for i in range(config["n_layer"]):
        at = f"transformer.h.{i}."
        for name, (m, n) in {"attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C), "mlp.c_fc": (C, M), "mlp.c_fc2": (C, M),
                             "mlp.c_proj": (M, C)}.items():  # fmt: skip
            shapes |= {f"{at}{name}.weight": (m, n), f"{at}{name}.bias": (n,)}
        shapes |= {f"{at}{ln}.{kind}": (C,) for ln in ("ln_1", "ln_2") for kind in ("weight", "bias")}
    weights = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    extra = {"lm_head.weight": weights["transformer.wte.weight"]}
    extra |= {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 32, 32, dtype=torch.uint8).tril() for i in range(2)}
    extra |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_parts(folder, "pytorch_model.bin", weights | extra, lambda path, some: torch.save(some, path))
    return config, {name: tensor.double() for name, tensor in weights.items()}


def test_crystal_as_released_computes_what_it_did(tokens, tmp_path):
    config, weights = crystal_folder(tmp_path / "crystal")
    assert convert.main([str(tmp_path / "crystal"), str(tmp_path / "out")]) == 0
    model, encoding, _ = load_model(tmp_path / "out", dtype=torch.float64)
    assert encoding is None and model.config.mup_base == 16 and model.config.tie and model.config.rotary == 0.25
    assert_same(log_probabilities(model, tokens), crystal(config, weights, tokens))


def test_crystal_7b_is_read_as_the_preset():
    released = {
        "model_type": "crystalcoder", "n_layer": 32, "n_head": 32, "n_embd": 4096, "n_inner": 10922,
        "n_positions": 2048, "vocab_size": 32032, "rotary_dim": 32, "position_embedding_type": "rotary",
        "activation_function": "swiglu", "layer_norm_epsilon": 1e-5, "mup_embeddings_scale": 14.6,
        "mup_output_alpha": 2.22, "mup_width_scale": 0.0625, "mup_scale_qk_dot_by_d": True, "tie_word_embeddings": True,
        "scale_attn_weights": True, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    knobs, *_ = convert.from_config(released)
    assert GPTConfig(**knobs, bias=True) == GPTConfig(**PRESETS["7B"])


def llama_folder(folder, weights=None, **changes):
    """A Llama whose two pairs of heads share keys and values, in parts."""
    config = {
        "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 512, "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False, "rope_theta": 10000.0,
    } | changes  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    shapes = {"model.embed_tokens": (512, 64), "lm_head": (512, 64), "model.norm": (64,)}
    for i in range(2):
        shapes |= {
            f"model.layers.{i}.self_attn.{n}_proj": (m, 64) for n, m in zip("qkvo", (64, 32, 32, 64), strict=True)
        }
        shapes |= {f"model.layers.{i}.mlp.{n}_proj": (96, 64) for n in ("gate", "up")}
        shapes |= {f"model.layers.{i}.mlp.down_proj": (64, 96)}
        shapes |= {f"model.layers.{i}.{n}_layernorm": (64,) for n in ("input", "post_attention")}
    made = {f"{name}.weight": 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    made |= weights or {}
    made = {name: tensor for name, tensor in made.items() if tensor is not None}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_parts(folder, "model.safetensors", made, convert.write_safetensors)
    return config, {name: tensor.double() for name, tensor in made.items()}


def test_a_llama_with_shared_keys_comes_in(tokens, tmp_path):
    config, weights = llama_folder(tmp_path / "llama")
    assert convert.main([str(tmp_path / "llama"), str(tmp_path / "out")]) == 0
    model, _, _ = load_model(tmp_path / "out", dtype=torch.float64)
    assert_same(log_probabilities(model, tokens), hugging_face(config, weights, tokens))


@pytest.mark.parametrize(
    "make, changes, word",
    [
        (crystal_folder, {"position_embedding_type": "alibi"}, "position_embedding_type is 'alibi'"),
        (crystal_folder, {"mup_embeddings_scale": 10.0}, "mup_embeddings_scale is 10.0"),
        (llama_folder, {"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06"),
        (llama_folder, {"rms_norm_eps": None}, "rms_norm_eps is 1e-06"),  # Llama's default
        (llama_folder, {"rope_theta": 500000.0}, "rope_theta is 500000.0"),
        (llama_folder, {"rope_parameters": {"rope_theta": 500000.0}}, "rope_theta is 500000.0"),
        (llama_folder, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        (llama_folder, {"head_dim": 32}, "head_dim is 32"),
        (llama_folder, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (llama_folder, {"model_type": "gpt2"}, "GPT-2 has learned positions"),
        (llama_folder, {"model_type": "qwen3"}, "'qwen3' does not fit"),
        (llama_folder, {"weights": {"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}}, "q_norm.weight"),
        (llama_folder, {"weights": {"model.layers.1.mlp.up_proj.weight": None}}, "has no model.layers.1.mlp.up_proj"),
        (llama_folder, {"weights": {"model.norm.weight": torch.ones(63)}}, "model.norm.weight is (63,)"),
        (llama_folder, {"weights": {"model.norm.weight": torch.ones(64).to(torch.int8)}}, "quantized"),
        (llama_folder, {"hidden_size": None}, "config.json"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_and_leaves_nothing(make, changes, word, tmp_path, capsys):
    make(tmp_path / "theirs", **changes)
    assert convert.main([str(tmp_path / "theirs"), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert word in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize(
    "knobs, word",
    [
        ({"norm": "rmsnorm"}, "turns all channels of a head, this model 0.25"),
        ({"norm": "rmsnorm", "rotary": 1.0, "parallel": True}, "no parallel blocks"),
    ],
)
def test_models_that_no_class_computes_are_refused(knobs, word, tmp_path, capsys):
    saved(random_model(**knobs), tmp_path / "out")
    assert convert.main([str(tmp_path / "out"), str(tmp_path / "hf")]) == 2
    assert word in capsys.readouterr().err and not (tmp_path / "hf").exists()


def test_damaged_files_and_existing_folders_are_named(tmp_path):
    llama_folder(tmp_path / "llama")
    crystal_folder(tmp_path / "crystal")
    for name, part in ("llama", "model-00002-of-00002.safetensors"), ("crystal", "pytorch_model-00002-of-00002.bin"):
        path = tmp_path / name / part
        for size in (path.stat().st_size - 100, 1000, 0):
            path.write_bytes(path.read_bytes()[:size])
            done = run("convert.py", tmp_path / name, tmp_path / "out")
            assert done.returncode == 2 and f"{path} is damaged" in done.stderr and done.stderr.count("\n") == 1
    done = run("convert.py", tmp_path / "llama", tmp_path)
    assert done.returncode == 2 and "exists; name a new folder" in done.stderr
    done = run("convert.py", tmp_path / "nothing", tmp_path / "out")
    assert done.returncode == 2 and "no checkpoint under" in done.stderr


def test_what_came_in_is_evaluated_and_trained_on(phases, data, tmp_path, capsys):
    weights = {f"model.layers.{i}.self_attn.{n}_proj.weight": torch.randn(64, 64) / 8 for i in range(2) for n in "kv"}
    llama_folder(tmp_path / "llama", weights, num_key_value_heads=4, nanocrystal_tokenizer=ABOUT)
    assert convert.main([str(tmp_path / "llama"), str(tmp_path / "came")]) == 0
    knobs = capsys.readouterr().out.split("--init_from=")[1].split()[1:]
    assert train.main([*phases("a", init_from=tmp_path / "came", share=0.1), *knobs]) == 0
    before = next(r["val"] for r in losses(tmp_path / "out", "a") if "val" in r)
    windows = f"--limit={before['code']['tokens'] // 32}"
    assert (
        run("eval.py", tmp_path / "came", f"--sources={data}", windows, f"--out={tmp_path / 'r.json'}").returncode == 0
    )
    scores = json.loads((tmp_path / "r.json").read_text())["tasks"]
    for name in ("text", "code"):
        assert scores[name]["scores"]["bpb"]["mean"] == pytest.approx(before[name]["bpb"], rel=1e-4)


# ----------------------------------------------------------------------------------- where their programs are installed


def random_texts():
    """Texts of all kinds of characters, of words that only look special, and of spellings of special ids."""
    letters = [chr(c) for c in (*range(0x250), *range(0x370, 0x600), 0x2028, 0x3000, *range(0x4E00, 0x4E50), 0x1F600)]
    letters += ["<|endoftext|>", "<|fim_prefix|>", "<mask_1>", "    ", "\r\n", "don't", "'S", "'ſ"] * 8
    dice = random.Random(6)
    return TEXTS + ["".join(dice.choices(letters, k=dice.randint(0, 40))) for _ in range(1000)]


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_computes_and_generates_the_same(name, tokens, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = random_model(**VARIANTS[name])
    convert.export(saved(model, tmp_path / "out"), tmp_path / "hf", torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    assert type(theirs).__name__ == json.loads((tmp_path / "hf/config.json").read_text())["architectures"][0]
    model.dtype = torch.float32
    with torch.no_grad():
        logs = theirs(tokens).logits.log_softmax(-1)
    assert_same(logs, log_probabilities(model, tokens))
    made = theirs.generate(tokens[:1, :5], max_new_tokens=20, do_sample=False)[0, 5:].tolist()
    steps = model.generate([tokens[0, :5].tolist()], 20, temperature=0, stop=tokenizer.eot(ENCODING))
    assert [token for token in made if token != tokenizer.eot(ENCODING)] == [token for (token,) in steps]


def test_autotokenizer_gives_the_same_ids(tmp_path):
    transformers = pytest.importorskip("transformers")
    convert.export(saved(random_model(), tmp_path / "out"), tmp_path / "hf", torch.float32)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    file = tokenizer.load(str(tmp_path / "hf/tokenizer.json"))
    assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.start(file) == tokenizer.eot(ENCODING)
    assert np.array_equal(tokenizer.byte_lengths(file), tokenizer.byte_lengths(ENCODING))
    for text in random_texts():
        ids = ENCODING.encode_ordinary(text)
        assert theirs(text)["input_ids"] == [tokenizer.eot(ENCODING), *ids]
        assert theirs.decode(ids) == file.decode(ids) == text
        assert file.encode_ordinary(text) == ids
    for piece in (b"hello wor", "é".encode()[1:], b"\r\n  x", "日".encode()[:2]):
        assert file._encode_single_piece(piece) == ENCODING._encode_single_piece(piece)


@pytest.mark.parametrize("kind", ["Llama", "StableLm"])
def test_what_transformers_saves_comes_in(kind, tokens, tmp_path):
    transformers = pytest.importorskip("transformers")
    shared = dict(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=32)  # fmt: skip
    own = {"Llama": dict(rms_norm_eps=1e-5, attention_bias=True), "StableLm": dict(use_qkv_bias=True)}[kind]
    torch.manual_seed(7)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**shared, **own)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p += 0.1 * torch.randn_like(p)
        theirs.save_pretrained(tmp_path / "hf")
        logs = theirs(tokens).logits.log_softmax(-1)
    assert convert.main([str(tmp_path / "hf"), str(tmp_path / "out")]) == 0
    model, _, _ = load_model(tmp_path / "out")
    assert_same(log_probabilities(model, tokens), logs)


def test_a_sentencepiece_tokenizer_is_read(tmp_path):
    library = pytest.importorskip("tokenizers")
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made = library.Tokenizer(library.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = library.normalizers.Sequence(
        [library.normalizers.Prepend("▁"), library.normalizers.Replace(" ", "▁")]
    )
    trainer = library.trainers.BpeTrainer(vocab_size=600, special_tokens=specials, show_progress=False)
    made.train_from_iterator(["\n".join(Path(ROOT / "mix.py").read_text().splitlines()[:200])], trainer)
    whole = json.loads(made.to_str())
    whole["added_tokens"] = whole["added_tokens"][:3]  # as Llama's: bytes are not special
    template = {"Sequence": {"id": "A", "type_id": 0}}
    begin = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    whole["post_processor"] = {"type": "TemplateProcessing", "special_tokens": begin, "pair": [template],
                               "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, template]}  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    encoding = tokenizer.load(str(tmp_path / "tokenizer.json"))
    assert (tokenizer.start(encoding), tokenizer.eot(encoding)) == (1, 2)
    for text in ("def f(x):\n    return x", "naïve 日本", "</s> is text", "x"):
        ids = encoding.encode_ordinary(text)
        assert encoding.decode(ids) == " " + text and not {1, 2} & {*ids}
        assert encoding.decode(encoding._encode_single_piece(text.encode())) == text
    cut = "日".encode()
    pieces = encoding._encode_single_piece(cut[:2]) + encoding._encode_single_piece(cut[2:])
    assert b"".join(map(encoding.decode_single_token_bytes, pieces)) == cut
    llama_folder(tmp_path / "llama")
    (tmp_path / "llama/tokenizer.json").write_text(json.dumps(whole))
    assert convert.main([str(tmp_path / "llama"), str(tmp_path / "out")]) == 0
    (tmp_path / "out").rename(tmp_path / "elsewhere")  # it takes its tokenizer along
    _, found, _ = load_model(tmp_path / "elsewhere")
    assert tokenizer.digest(found) == tokenizer.digest(encoding)
    file = tmp_path / "elsewhere/tokenizer.json"
    done = run("prepare.py", f"code={ROOT / 'mix.py'}", f"--out={tmp_path / 'data'}", f"--tokenizer={file}", "--val=0")
    assert done.returncode == 0, done.stderr
    ids = np.fromfile(tmp_path / "data/code/train-00000.bin", np.uint16)
    assert ids.tolist() == [*encoding.encode_ordinary((ROOT / "mix.py").read_text()), 2]
