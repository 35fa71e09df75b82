"""What convert.py promises: other programs' arithmetic on the folders it writes and reads gives our numbers.

`pip install transformers` turns on what is compared with transformers itself.
"""

import importlib
import itertools
import json
import os
import pickle
import random
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import regex
import torch
import torch.nn.functional as F

import checkpoint
import convert
import eval as evaluation
import files
import sample
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
    rows = config["vocab_size"], 64
    shapes = {"model.embed_tokens": rows, "lm_head": rows, "model.norm": (64,)}
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
        (llama_folder, {"hidden_size": None}, "config.json: hidden_size is None"),
        (llama_folder, {"hidden_size": "64"}, "config.json: hidden_size is '64'"),
        (llama_folder, {"num_hidden_layers": 10**9}, "config.json: num_hidden_layers is 1000000000"),
        (llama_folder, {"num_hidden_layers": 100}, "has no model.layers.2."),
        (llama_folder, {"max_position_embeddings": -1}, "config.json: max_position_embeddings is -1"),
        (llama_folder, {"num_attention_heads": 3}, "config.json: n_embd = 64 is not a multiple"),
        (llama_folder, {"num_key_value_heads": 3}, "config.json: 3 heads of keys do not divide 4"),
        (llama_folder, {"tie_word_embeddings": "yes"}, "config.json: tie_word_embeddings is 'yes'"),
        (llama_folder, {"rope_scaling": [2]}, "config.json: rope_parameters is [2]"),
        (llama_folder, {"model_type": None}, "model_type None does not fit"),
        (llama_folder, {"nanocrystal_tokenizer": [1]}, "tokenizer is [1], not an object"),
        (llama_folder, {"nanocrystal_tokenizer": ABOUT | {"sha256": "0"}}, "another nanocrystal"),
        (crystal_folder, {"rotary_dim": 9}, "config.json: rotary = 0.28125"),
        (crystal_folder, {"n_positions": True}, "config.json: n_positions is True"),
        (llama_folder, {"weights": {"lm_head.weight": torch.ones(512 * 64)}}, "lm_head.weight is (32768,)"),
        (
            llama_folder,
            {"weights": {"lm_head.weight": torch.ones(64, 512)}},
            "is (64, 512), config.json says (512, 64)",
        ),
        (
            llama_folder,
            {"weights": {"model.norm.weight": torch.full((64,), torch.nan)}},
            "model.norm.weight has 64 of 64",
        ),
        (
            llama_folder,
            {"weights": {"model.norm.weight": torch.tensor([*[1.0] * 63, -torch.inf])}},
            "has 1 of 64 numbers",
        ),
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


def test_damaged_files_and_existing_folders_are_named(tmp_path, capsys):
    llama_folder(tmp_path / "llama")
    crystal_folder(tmp_path / "crystal")

    def refused(source, target, words):
        assert convert.main([str(tmp_path / source), str(target)]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1

    for name, part in ("llama", "model-00002-of-00002.safetensors"), ("crystal", "pytorch_model-00002-of-00002.bin"):
        path = tmp_path / name / part
        for size in (path.stat().st_size - 100, 1000, 0):
            path.write_bytes(path.read_bytes()[:size])
            refused(name, tmp_path / "out", f"{path} is damaged")
    (tmp_path / "link").symlink_to("nowhere")
    for target in (tmp_path, tmp_path / "link"):
        refused("llama", target, "exists; name a new folder")
    refused("nothing", tmp_path / "out", "no checkpoint under")
    (tmp_path / "llama/model.safetensors.index.json").unlink()
    (tmp_path / "llama/model.safetensors").mkdir()
    refused("llama", tmp_path / "out", "has neither")


@pytest.mark.parametrize("rows, about", [(512, ABOUT), (640, ABOUT), (640, None)])  # 640: some only pad
def test_what_came_in_is_evaluated_and_trained_on(rows, about, phases, data, tmp_path, capsys):
    weights = {f"model.layers.{i}.self_attn.{n}_proj.weight": torch.randn(64, 64) / 8 for i in range(2) for n in "kv"}
    known = {"nanocrystal_tokenizer": about} if about else {}
    _, theirs = llama_folder(tmp_path / "llama", weights, num_key_value_heads=4, vocab_size=rows, **known)
    assert convert.main([str(tmp_path / "llama"), str(tmp_path / "it's in")]) == 0
    words = shlex.split(capsys.readouterr().out.split("<phase>.py ")[1])
    assert train.main([*phases("a", share=0.1), *words]) == 0  # as was printed
    before = next(r["val"] for r in losses(tmp_path / "out", "a") if "val" in r)
    if about:
        limit = f"--limit={before['code']['tokens'] // 32}"
        arguments = tmp_path / "it's in", f"--sources={data}", limit, f"--out={tmp_path / 'r.json'}"
        assert evaluation.main([str(word) for word in arguments]) == 0
        scores = json.loads((tmp_path / "r.json").read_text())["tasks"]
        for name in ("text", "code"):
            assert scores[name]["scores"]["bpb"]["mean"] == pytest.approx(before[name]["bpb"], rel=1e-4)
        assert sample.main([str(tmp_path / "it's in"), "--tokens=60", "--temperature=9", "--top_p=1"]) == 0
    for source, n_rows in (tmp_path / "it's in", 512 if about else rows), (tmp_path / "out/a", 512):
        target = tmp_path / f"hf {n_rows} {source.name}"
        assert convert.main([str(source), str(target)]) == 0
        weights = read(target / "model.safetensors")
        assert len(weights["lm_head.weight"]) == len(weights["model.embed_tokens.weight"]) == n_rows
        if source.name != "a":
            assert torch.equal(weights["lm_head.weight"], theirs["lm_head.weight"][:n_rows])


def own_tokenizer(data, folder):
    """Sources that were prepared with folder/mine.json, of the same ids as `data`, named from within the folder."""
    pytest.importorskip("tokenizers")
    shutil.copytree(data, folder / "data")
    (folder / "mine.json").write_text(json.dumps(convert.tokenizer_files(ENCODING, 32)["tokenizer.json"]))
    encoding = tokenizer.load(str(folder / "mine.json"))
    for record in folder.glob("data/*/meta.json"):
        meta = json.loads(record.read_text())
        meta["tokenizer"] |= {"name": "mine.json", "sha256": tokenizer.digest(encoding)}
        record.write_text(json.dumps(meta))
    return encoding


@pytest.mark.parametrize("place", ["where it was", "beside a source"])
def test_a_run_keeps_its_tokenizer(place, phases, data, tmp_path, monkeypatch, capsys):
    encoding = own_tokenizer(data, tmp_path)
    digest = tokenizer.digest(encoding)
    monkeypatch.chdir(tmp_path)
    if place == "beside a source":
        (tmp_path / "mine.json").rename(tmp_path / "data/code/tokenizer.json")
    knobs = {"data": tmp_path / "data", "share": 0.1}
    assert train.main(phases("a", **knobs)) == 0
    for path in (tmp_path / "data/code/tokenizer.json", tmp_path / "mine.json"):
        path.unlink(missing_ok=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.move(tmp_path / "out/a", "moved")
    assert sample.main(["moved", "--tokens=3"]) == 0
    assert convert.main(["moved", "hf"]) == 0 and convert.main(["hf", "back"]) == 0
    for folder in ("hf", "back"):
        assert tokenizer.digest(tokenizer.load(f"{folder}/tokenizer.json")) == digest
    capsys.readouterr()
    assert train.main(phases("a", **knobs)) == 2 and "there is no mine.json" in capsys.readouterr().err
    tokenizer.keep(encoding, tmp_path / "data/text")
    assert train.main(phases("b", init_from="moved", out="next", **knobs)) == 0
    assert tokenizer.digest(load_model(tmp_path / "next/b")[1]) == digest
    Path("moved/tokenizer.json").write_text(
        json.dumps(convert.tokenizer_files(tokenizer.load(vocab_size=400), 32)["tokenizer.json"])
    )
    for command in (sample.main, ["moved"]), (convert.main, ["moved", "hf2"]):
        assert command[0](command[1]) == 2 and "another mine.json" in capsys.readouterr().err


@pytest.mark.parametrize("n_rows", [700, 640, 600, 576])
def test_an_embedding_may_have_more_rows_than_ids_or_fewer_for_special_ones(n_rows, tmp_path, capsys):
    pytest.importorskip("tokenizers")
    ids, end = 640, 576  # 576 for text, the end of text, 63 other special ones
    _, theirs = llama_folder(tmp_path / "llama", vocab_size=n_rows)
    whole = convert.tokenizer_files(tokenizer.load(vocab_size=ids), 32)["tokenizer.json"]
    (tmp_path / "llama/tokenizer.json").write_text(json.dumps(whole))
    code = convert.main([str(tmp_path / "llama"), str(tmp_path / "in")])
    said = capsys.readouterr()
    if n_rows == end:
        assert code == 2 and "ids up to 576 for text, the embedding only 576 rows" in said.err
        return
    assert code == 0 and ("special ids beyond" in said.out) == (ids > n_rows)
    model = load_model(tmp_path / "in")[2]["model"]
    assert (model["vocab_size"], model["vocab_real"]) == (max(ids, n_rows), min(ids, n_rows))
    for seed in range(3):
        assert sample.main([str(tmp_path / "in"), "--tokens=60", "--temperature=9", "--top_p=1", f"--seed={seed}"]) == 0
    assert convert.main([str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    rows = read(tmp_path / "out/model.safetensors")["lm_head.weight"]
    assert torch.equal(rows, theirs["lm_head.weight"][: min(ids, n_rows)])
    assert (tmp_path / "out/tokenizer.json").read_text() == (tmp_path / "llama/tokenizer.json").read_text()


# -------------------------------------------------------------------------------- what strangers' folders may hold


def safetensors(path, change=None, data=None, text=None):
    """Write a file of two tensors and a table, of which `change` may alter the header."""
    header = {
        "__metadata__": {"format": "pt"},
        "b": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "a": {"dtype": "F16", "shape": [4], "data_offsets": [24, 32]},
        "table": {"dtype": "F8_E4M3", "shape": [5], "data_offsets": [32, 37]},
        "none": {"dtype": "I64", "shape": [0, 7], "data_offsets": [37, 37]},
        "one": {"dtype": "BF16", "shape": [], "data_offsets": [37, 39]},
    }
    header = (change or (lambda header: header))(header) or header
    text = json.dumps(header).encode() if text is None else text
    path.write_bytes(len(text).to_bytes(8, "little") + text + (bytes(range(39)) if data is None else data))
    return path


def test_odd_but_right_safetensors_are_read(tmp_path):
    found = convert.read_safetensors(safetensors(tmp_path / "x", lambda header: dict(reversed(header.items()))))
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        "one": (), "none": (0, 7), "table": (5,), "a": (4,), "b": (2, 3),
    }  # fmt: skip
    assert found["b"].numpy().tobytes() == bytes(range(24)) and found["a"].dtype == torch.float16
    padded = json.dumps({"a": A_BYTE}).encode() + b" " * 99
    assert convert.read_safetensors(safetensors(tmp_path / "y", data=b"7", text=padded))["a"].tolist() == [55]


A_BYTE = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
HEADERS = {
    "before the file": (lambda h: h["b"].update(data_offsets=[-24, 0]), "data_offsets [-24, 0]"),
    "bytes shared": (lambda h: h["a"].update(data_offsets=[20, 28]), "a begins at byte 20"),
    "bytes skipped": (lambda h: h["a"].update(data_offsets=[26, 34]), "a begins at byte 26"),
    "another size": (lambda h: h["b"].update(shape=[2, 4]), "b, [2, 4] of F32, does not fill bytes 0 to 24"),
    "a negative shape": (lambda h: h["b"].update(shape=[-2, -3]), "b has shape [-2, -3]"),
    "half a number": (lambda h: h["b"].update(shape=[2.0, 3]), "b has shape [2.0, 3]"),
    "an unknown dtype": (lambda h: h["b"].update(dtype="F31"), "b is of the unknown dtype 'F31'"),
    "no offsets": (lambda h: {**h, "b": {"dtype": "F32", "shape": [2, 3]}}, "data_offsets None"),
    "no object": (lambda h: {**h, "b": None}, "b is of the unknown dtype None"),
    "bytes left over": (lambda h: {k: v for k, v in h.items() if k != "one"}, "take 37 bytes, it has 39"),
}  # fmt: skip
FILES = {
    "cut": {"data": bytes(38)},
    "longer": {"data": bytes(40)},
    "a list": {"text": b"[1,2]"},
    "null": {"text": b"null"},
    "twice": {"text": f'{{"a": {json.dumps(A_BYTE)}, "a": {json.dumps(A_BYTE)}}}'.encode(), "data": b"7"},
    "deep": {"text": b"[" * 100_000},
    "not UTF-8": {"text": b'{"\xff": 1}'},
    "no header": {"text": b""},
}


@pytest.mark.parametrize("name", [*HEADERS, *FILES])
def test_safetensors_whose_bytes_do_not_add_up_are_refused(name, tmp_path):
    change, words = HEADERS.get(name, (None, ""))
    path = safetensors(tmp_path / "model.safetensors", change, **FILES.get(name, {}))
    with pytest.raises(convert.ConvertError) as refused:
        convert.read_safetensors(path)
    assert str(refused.value).startswith(f"{path} is damaged") and words in str(refused.value)


class Command:
    def __reduce__(self):
        return print, ("a pickle has run a command",)


def broken(folder, name, content):
    """A Llama one of whose files holds such bytes, or what torch.save makes of an object."""
    llama_folder(folder)
    if name == "pytorch_model.bin":
        for part in folder.glob("model*"):
            part.unlink()
    if isinstance(content, bytes):
        (folder / name).write_bytes(content)
    else:
        torch.save(content, folder / name)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("config.json", b"", "config.json is not JSON"),
        ("config.json", b'["llama"]', "config.json: it is"),
        ("config.json", b"\xff\xfe{", "config.json is not JSON"),
        ("config.json", b"{}", "model_type None"),
        ("model.safetensors.index.json", b"[]", "index.json: it is"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": 1}}', "weight_map.a is 1"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../theirs/config.json"}}', "not in its folder"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "/etc/passwd"}}', "not in its folder"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "gone.safetensors"}}', "which is not there"),
        ("pytorch_model.bin", Command(), "holds more than tensors"),
        ("pytorch_model.bin", {"model.norm.weight": Command()}, "holds more than tensors"),
        ("pytorch_model.bin", {"state_dict": {"a": torch.ones(1)}}, "state_dict is no plain tensor"),
        ("pytorch_model.bin", {"a": torch.ones(2, 2).to_sparse()}, "a is no plain tensor"),
        ("pytorch_model.bin", [torch.ones(1)], "is no dict of tensors"),
        ("pytorch_model.bin", pickle.dumps({"a": 1}, protocol=4), "is damaged"),  # of which torch also warns
    ],
)
def test_hostile_folders_are_refused_in_one_line(name, content, words, tmp_path, capsys, recwarn):
    broken(tmp_path / "theirs", name, content)
    assert convert.main([str(tmp_path / "theirs"), str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert words in err and err.count("\n") == 1 and "has run" not in out and not recwarn
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_what_is_missing_or_there_twice_is_named(tmp_path, capsys):
    llama_folder(tmp_path / "llama")
    part = next((tmp_path / "llama").glob("model-00001*"))
    index = tmp_path / "llama/model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    (part.with_name("again.safetensors")).write_bytes(part.read_bytes())
    index.write_text(json.dumps({"weight_map": names | {"x": "again.safetensors"}}))
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp/a person's").write_text("work")
    assert convert.main([str(tmp_path / "llama"), str(tmp_path / "out")]) == 2
    assert "again.safetensors and in" in capsys.readouterr().err
    index.write_text(json.dumps({"weight_map": names}))
    config = tmp_path / "llama/config.json"
    config.write_bytes("\ufeff".encode() + config.read_bytes())  # as an editor may leave it
    assert convert.main([str(tmp_path / "llama"), str(tmp_path / "out")]) == 0
    config.unlink()
    assert convert.main([str(tmp_path / "llama"), str(tmp_path / "out2")]) == 2
    assert "no config.json" in capsys.readouterr().err
    assert (tmp_path / "out.tmp/a person's").read_text() == "work"


# ------------------------------------------------------------------------------------- checkpoints that cannot be meant


def rewritten(folder, **entries):
    """Change entries of a checkpoint's state.json, as if they had been saved like that."""
    (state,) = folder.glob("checkpoints/*/state.json")
    content = json.loads(state.read_text())
    content["model"] |= entries.pop("model", {})
    state.write_text(json.dumps(content | entries))
    marker = state.with_name(checkpoint.MARKER)
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"state.json": files.sha256(state)}))


@pytest.mark.parametrize(
    "entries, words",
    [
        ({"model": {"n_layer": 10**9}}, "n_layer = 1,000,000,000"),
        ({"model": {"n_layer": 100}}, "blocks.2.ln_1.weight is missing"),
        ({"model": {"n_embd": 128}}, "wte.weight is (640, 64), state.json says (640, 128)"),
        ({"model": {"n_head": "2"}}, "n_head = '2' is not of type int"),
        ({"model": {"tie": 1}}, "tie = 1 is not of type bool"),
        ({"model": {"vocab_real": 641}}, "vocab_real = 641"),
        ({"model": {"heads": 2}}, "heads"),
        ({"model": {"vocab_size": 320, "vocab_real": 320}}, "makes higher ids"),
        ({"config": []}, "config is []"),
        ({"phase": None}, "phase is null"),
        ({"tokenizer": {"name": 1}}, "tokenizer"),
        ({"tokenizer": ABOUT | {"sha256": ""}}, "another nanocrystal"),
        ({"tokenizer": ABOUT | {"name": "gone.json"}}, "there is no gone.json"),
    ],
)
def test_a_checkpoint_that_describes_another_model_is_refused_in_one_line(entries, words, tmp_path, capsys):
    rewritten(saved(random_model(), tmp_path / "out"), **entries)
    assert sample.main([str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_weights_that_are_no_numbers_are_named(tmp_path, capsys):
    model = random_model()
    with torch.no_grad():
        model.ln_f.weight[:3] = 1e30  # more than float16 holds
    saved(model, tmp_path / "large")
    assert convert.main([str(tmp_path / "large"), str(tmp_path / "hf"), "--dtype=float16"]) == 2
    assert "model.norm.weight has 3 of 64 numbers" in capsys.readouterr().err
    with torch.no_grad():
        model.ln_f.weight[:2] = torch.tensor([torch.nan, torch.inf])
    saved(model, tmp_path / "nan")
    for main, arguments in (sample.main, []), (convert.main, [str(tmp_path / "hf")]):
        assert main([str(tmp_path / "nan"), *arguments]) == 2
        assert "2 numbers of ln_f.weight are NaN or infinite" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


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
    llama_folder(tmp_path / "llama", vocab_size=640)
    (tmp_path / "llama/tokenizer.json").write_text(json.dumps(whole))
    assert convert.main([str(tmp_path / "llama"), str(tmp_path / "out")]) == 0
    (tmp_path / "out").rename(tmp_path / "elsewhere")  # it takes its tokenizer along
    _, found, _ = load_model(tmp_path / "elsewhere")
    assert tokenizer.digest(found) == tokenizer.digest(encoding)
    assert convert.main([str(tmp_path / "elsewhere"), str(tmp_path / "exported")]) == 0
    if find_spec("transformers"):
        theirs = importlib.import_module("transformers").AutoTokenizer.from_pretrained(tmp_path / "exported")
        for text in ("def f(x):\n    return x", "naïve 日本", "</s> is text", " x "):
            assert theirs(text)["input_ids"] == [1, *encoding.encode_ordinary(text)]
        assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
    file = tmp_path / "elsewhere/tokenizer.json"
    done = run("prepare.py", f"code={ROOT / 'mix.py'}", f"--out={tmp_path / 'data'}", f"--tokenizer={file}", "--val=0")
    assert done.returncode == 0, done.stderr
    ids = np.fromfile(tmp_path / "data/code/train-00000.bin", np.uint16)
    assert ids.tolist() == [*encoding.encode_ordinary((ROOT / "mix.py").read_text()), 2]
