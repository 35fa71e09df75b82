"""Weights out to Hugging Face folders, and in from them.

    python convert.py out/phase3 exported             # a checkpoint -> StableLmForCausalLM; of rmsnorm LlamaForCausalLM
    python convert.py downloads/Crystal out/crystal   # LLM360's Crystal, a Llama or a StableLM -> a checkpoint
    python eval.py out/crystal --data=eval            # which is evaluated, sampled from and trained on like any other

Out: config.json, generation_config.json, model.safetensors, and the tokenizer as AutoTokenizer reads it. muP has no
place there, so its factors go into weights: embedding and head, which can then not be tied, and the queries, whose
products Hugging Face divides by sqrt(head_dim) and muP by head_dim. Rows that pad the vocabulary are left out. The
tokenizer puts an end of text before a text, as training does, and takes the names of special ids in it for plain text.

In: safetensors or pytorch_model.bin, whole or in parts. Crystal keeps its muP; its rotary channels are pairs of
neighbours (GPT-J) and are put into halves, as are all of ours. Heads that share keys and values get copies of them.
Rows beyond the ids of tokenizer.json only pad, and get no probability. The new checkpoint is at step 0 of no phase, in
fp32.

What one side cannot represent is refused, with the reason.
"""

import dataclasses
import itertools
import json
import math
import mmap
import os
import shlex
import shutil
import warnings
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F

import checkpoint
import errors
import files
import tokenizer
from errors import UserError
from model import EMBEDDING_SCALE, GPT, LARGEST, LOGIT_SCALE, GPTConfig
from sample import load_model

# Our parameters, and the ones of which they are stacked.
LLAMA = {  # and StableLM
    "wte": ["model.embed_tokens"], "head": ["lm_head"], "ln_f": ["model.norm"],
    "ln_1": ["input_layernorm"], "ln_2": ["post_attention_layernorm"],
    "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "attn_out": ["self_attn.o_proj"],
    "gate_up": ["mlp.gate_proj", "mlp.up_proj"], "mlp_out": ["mlp.down_proj"],
}  # fmt: skip
CRYSTAL = {  # GPT-2's names and transposed matrices; silu is on the second of the MLP's branches
    "wte": ["transformer.wte"], "head": ["lm_head"], "ln_f": ["transformer.ln_f"], "ln_1": ["ln_1"], "ln_2": ["ln_2"],
    "qkv": ["attn.c_attn"], "attn_out": ["attn.c_proj"], "gate_up": ["mlp.c_fc2", "mlp.c_fc"],
    "mlp_out": ["mlp.c_proj"],
}  # fmt: skip
BUFFERS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")  # tables that older releases hold
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}  # fmt: skip
BITS = {"U64": 64, "C64": 64, "U32": 32, "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6,
        "F6_E3M2": 6, "F4": 4}  # fmt: skip  # other numbers that safetensors has: of no use here, but no mistake
BITS |= {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()}
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
LONGEST_HEADER = 100_000_000  # bytes, as the library of the format has it


class ConvertError(UserError):
    """What cannot be converted, and why, in one line."""


def place(name, layout, blocks):
    """Our parameter's name -> [theirs, ...], and which part of a block it is."""
    *block, part, kind = name.split(".")
    prefix = f"{blocks}.{block[1]}." if block else ""
    return [f"{prefix}{theirs}.{kind}" for theirs in layout[part]], part


# ----------------------------------------------------------------------------------------------------------------- out


def to_hugging_face(model):
    """(config as a dict, {name: fp32 tensor}) of the class that computes what a GPT does. ConvertError if none does."""
    c, llama = model.config, model.config.norm == "rmsnorm"
    if llama and (c.parallel or c.rotary < 1):
        raise ConvertError(
            "LlamaForCausalLM has no parallel blocks" if c.parallel else
            f"LlamaForCausalLM turns all channels of a head, this model {c.rotary:g} of them (rotary)"
        )  # fmt: skip
    same_head = c.tie and model.embedding_scale == model.logit_scale == 1
    tensors = {}
    for name, p in model.named_parameters():
        theirs, part = place(name, LLAMA, "model.layers")
        p = p.detach().float()
        if not llama and part in ("attn_out", "gate_up", "mlp_out") and name.endswith("bias"):
            if p.any():
                raise ConvertError(
                    f"StableLmForCausalLM has no place for {name}; no causal class has all of this model"
                )
            continue
        if part in ("wte", "head"):
            p = p[: c.vocab_real] * (model.embedding_scale if part == "wte" else model.logit_scale)
        tensors |= zip(theirs, p.chunk(len(theirs)), strict=True)
        if part == "qkv":  # ours are scaled by block.scale, theirs by head_dim^-0.5
            tensors[theirs[0]] = tensors[theirs[0]] * (model.blocks[0].scale * c.head_dim**0.5)
        if part.startswith("ln") and not llama and not c.bias:
            tensors[theirs[0].replace("weight", "bias")] = torch.zeros(c.n_embd)
    if c.tie and not same_head:
        tensors["lm_head.weight"] = model.wte.weight.detach()[: c.vocab_real].float() * model.logit_scale
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = {
        "vocab_size": c.vocab_real, "hidden_size": c.n_embd, "intermediate_size": c.n_inner,
        "num_hidden_layers": c.n_layer, "num_attention_heads": c.n_head, "num_key_value_heads": c.n_head,
        "max_position_embeddings": c.block_size, "hidden_act": "silu", "rope_theta": 10000.0, "rope_parameters": rope,
        "tie_word_embeddings": same_head, "use_cache": True,
    }  # fmt: skip
    if llama:
        config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5,
                   "attention_bias": c.bias, "mlp_bias": c.bias}  # fmt: skip
    else:
        rope["partial_rotary_factor"] = c.rotary
        config |= {"architectures": ["StableLmForCausalLM"], "model_type": "stablelm", "layer_norm_eps": 1e-5,
                   "use_qkv_bias": c.bias, "use_parallel_residual": c.parallel, "qk_layernorm": False,
                   "partial_rotary_factor": c.rotary}  # fmt: skip
    return config, tensors


def tokenizer_files(encoding, block_size):
    """{file name: content} from which AutoTokenizer makes what gives a tiktoken.Encoding's ids."""
    characters, end = tokenizer.byte_characters(), "<|endoftext|>"
    ranks = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    written = {token: "".join(characters[byte] for byte in token) for token, _ in ranks}
    merges = [[written[part] for part in parts(token, encoding._mergeable_ranks)] for token, _ in ranks if token[1:]]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    text, separator = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": end, "type_id": 0}}
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": encoding._pat_str}, "behavior": "Isolated", "invert": False}
    specials = sorted(encoding._special_tokens.items(), key=lambda item: item[1])
    whole = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "added_tokens": [{"id": i, "content": name, **plain} for name, i in specials],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytewise]},
        "post_processor": {
            "type": "TemplateProcessing", "single": [separator, text],
            "pair": [separator, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {end: {"id": end, "ids": [tokenizer.eot(encoding)], "tokens": [end]}},
        },
        "decoder": bytewise,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {written[token]: rank for token, rank in ranks}, "merges": merges,
        },
    }  # fmt: skip
    return {"tokenizer.json": whole, "tokenizer_config.json": tokenizer_config(encoding, block_size)}


def tokenizer_config(encoding, block_size):
    """tokenizer_config.json with which AutoTokenizer takes a tokenizer.json as it is."""
    names = {i: name for name, i in reversed(encoding._special_tokens.items())}
    end = names[tokenizer.eot(encoding)]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": names.get(tokenizer.start(encoding), end),
        "eos_token": end, "pad_token": end, "model_max_length": block_size, "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }  # fmt: skip


def parts(token, ranks):
    """The two tokens that byte-pair encoding joins last when it makes a token."""
    pieces = [token[i : i + 1] for i in range(len(token))]
    while len(pieces) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(pieces)]
        i = pairs.index(min(pairs))
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


def copy_settings(encoding, folder):
    """How other programs use a tokenizer.json, if that is said beside it, goes with it."""
    from_file = isinstance(encoding, tokenizer.FileEncoding) and Path(encoding.name).name == tokenizer.COPY
    if from_file and (settings := Path(encoding.name).with_name("tokenizer_config.json")).exists():
        shutil.copy(settings, folder)


def write_safetensors(path, tensors):
    """Eight bytes with the length of a JSON header, the header, the tensors one after another."""
    names, header, at = {kind: name for name, kind in DTYPES.items()}, {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        end = at + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            f.write(tensor.contiguous().view(torch.uint8).numpy())
    files.sync(path)


def export(source, target, dtype):
    """A checkpoint -> the Hugging Face folder `target`, which appears when it is whole."""
    model, encoding, state = load_model(source)
    config, tensors = to_hugging_face(model)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if why := not_finite(tensor):
            raise ConvertError(f"{source}: {name} has {why} in {dtype}; try another --dtype")
    contents = {"config.json": config | {"dtype": str(dtype).split(".")[1], "torch_dtype": str(dtype).split(".")[1]}}
    if encoding is None:
        print("the checkpoint's data named no tokenizer, so there is none to write")
    else:
        ends = {"bos_token_id": tokenizer.start(encoding), "eos_token_id": tokenizer.eot(encoding)}
        ends["pad_token_id"] = ends["eos_token_id"]
        contents["config.json"] |= ends
        contents["generation_config.json"] = ends
        if isinstance(encoding, tokenizer.FileEncoding):
            contents["tokenizer_config.json"] = tokenizer_config(encoding, model.config.block_size)
        else:
            contents |= tokenizer_files(encoding, model.config.block_size)
            contents["config.json"]["nanocrystal_tokenizer"] = state["tokenizer"]
    with files.new_folder(target) as temporary:
        for name, content in contents.items():
            files.write_json(temporary / name, content)
        tokenizer.keep(encoding, temporary)
        copy_settings(encoding, temporary)
        write_safetensors(temporary / "model.safetensors", tensors)
    return f"{config['architectures'][0]}, {sum(t.numel() for t in tensors.values()):,} numbers in {dtype}"


def not_finite(tensor):
    """How many numbers of a tensor are none, in words; empty if all are."""
    count = int((~tensor.isfinite()).sum())
    return f"{count:,} of {tensor.numel():,} numbers NaN or infinite" if count else ""


# ------------------------------------------------------------------------------------------------------------------ in


def require(config, **needed):
    """Every knob of a config.json, or its default there, is what our model does: name=(default, what is possible)."""
    for name, (default, possible) in needed.items():
        value = default if config.get(name) is None else config[name]
        if value not in possible:
            raise ConvertError(f"{name} is {value!r:.80}; this model can only do {' or '.join(map(repr, possible))}")


def number(config, name, default=None, kind=int):
    """A number of a config.json that counts or measures something, or its default if it has one. ConvertError."""
    value = default if config.get(name) is None else config[name]
    if type(value) not in ((int,) if kind is int else (int, float)) or not 0 < value <= LARGEST:
        what = f"whole number from 1 to {LARGEST:,}" if kind is int else "number above 0"
        raise ConvertError(f"{name} is {value!r:.80}, which is no {what}")
    return value


def flag(config, name, default):
    """What a config.json says yes or no to, or its default there. ConvertError."""
    value = default if config.get(name) is None else config[name]
    if type(value) is not bool:
        raise ConvertError(f"{name} is {value!r:.80}, which is neither true nor false")
    return value


def from_config(config):
    """config.json as a dict -> (knobs of GPTConfig but for bias, LLAMA or CRYSTAL, where their blocks are, whether
    rotary pairs are neighbours, heads of keys and values). ConvertError says what does not fit."""
    kind = config.get("model_type")
    if kind == "crystalcoder":
        require(
            config, position_embedding_type=("learned", ["rotary"]), activation_function=("gelu_new", ["swiglu"]),
            layer_norm_epsilon=(1e-5, [1e-5]), scale_attn_weights=(True, [True]),
            scale_attn_by_inverse_layer_idx=(False, [False]), mup_scale_qk_dot_by_d=(False, [True]),
            mup_embeddings_scale=(1.0, [EMBEDDING_SCALE]), mup_output_alpha=(1.0, [LOGIT_SCALE]),
        )  # fmt: skip
        knobs = {name: number(config, name) for name in ("n_layer", "n_head", "n_embd", "n_inner", "vocab_size")}
        heads, width = knobs["n_head"], knobs["n_embd"]
        knobs |= {"block_size": number(config, "n_positions"), "tie": flag(config, "tie_word_embeddings", True)}
        knobs["mup_base"] = max(1, round(number(config, "mup_width_scale", kind=float) * width))
        knobs["rotary"] = number(config, "rotary_dim") / max(1, width // heads)
        return knobs, CRYSTAL, "transformer.h", True, heads
    if kind not in ("llama", "stablelm"):
        reason = "GPT-2 has learned positions and an MLP without gate; " if kind == "gpt2" else ""
        raise ConvertError(f"model_type {kind!r:.80} does not fit: {reason}there are crystalcoder, llama and stablelm")
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ConvertError(f"rope_parameters is {scaling!r:.80}, which is no object")
    rope = config | scaling
    require(rope, rope_theta=(10000.0, [10000.0]), rope_type=(rope.get("type", "default"), ["default"]))
    heads, width = number(config, "num_attention_heads"), number(config, "hidden_size")
    require(config, hidden_act=("silu", ["silu"]), head_dim=(width // heads, [width // heads]))
    if kind == "llama":
        require(config, rms_norm_eps=(1e-6, [1e-5]))
        knobs = {"norm": "rmsnorm", "rotary": 1.0}
    else:
        require(config, layer_norm_eps=(1e-5, [1e-5]), qk_layernorm=(False, [False]))
        knobs = {
            "rotary": number(rope, "partial_rotary_factor", 0.25, float),
            "parallel": flag(config, "use_parallel_residual", False),
        }
    knobs |= {
        "n_layer": number(config, "num_hidden_layers"), "n_head": heads, "n_embd": width, "mup_base": 0,
        "n_inner": number(config, "intermediate_size"), "vocab_size": number(config, "vocab_size"),
        "block_size": number(config, "max_position_embeddings"), "tie": flag(config, "tie_word_embeddings", False),
    }  # fmt: skip
    return knobs, LLAMA, "model.layers", False, number(config, "num_key_value_heads", heads)


def from_hugging_face(folder, config):
    """A folder and what its config.json says -> (GPTConfig, {our parameter's name: fp32 tensor}). ConvertError."""
    try:
        knobs, layout, blocks, neighbours, kv_heads = from_config(config)
    except ConvertError as error:
        raise ConvertError(f"{folder}/config.json: {error}") from None
    found = read_weights(folder)
    used = {"lm_head.weight"} if knobs["tie"] else set()  # there it is a copy
    used |= {name for name in found if name.endswith(BUFFERS)}
    biases = {name for name in found if name.endswith(".bias")} - used
    used |= {name for name in biases if not found[name].any()}
    try:
        model_config = GPTConfig(**knobs, bias=bool(biases - used))
    except ValueError as error:
        raise ConvertError(f"{folder}/config.json: {error}") from None
    if model_config.n_head % kv_heads:
        raise ConvertError(f"{folder}/config.json: {kv_heads} heads of keys do not divide {model_config.n_head}")
    with torch.device("meta"):
        model = GPT(model_config)
    made = {}
    for name, p in model.named_parameters():
        theirs, part = place(name, layout, blocks)
        used |= {*theirs}
        if name.endswith("bias") and theirs[0] not in found:
            made[name] = torch.zeros(p.shape)
            continue
        heights = [len(p) // len(theirs)] * len(theirs)
        if part == "qkv" and len(theirs) == 3:
            heights[1:] = [kv_heads * model_config.head_dim] * 2
        turned = layout is CRYSTAL and p.dim() == 2 and part not in ("wte", "head")
        pieces = []
        for one, height in zip(theirs, heights, strict=True):
            shape = (height, *p.shape[1:])
            piece = check(folder, one, found.get(one), shape[::-1] if turned else shape)
            pieces.append(piece.T if turned else piece)
        whole = torch.cat(one_key_a_head(pieces, model_config.head_dim) if part == "qkv" else pieces)
        made[name] = halves_apart(whole, model_config) if neighbours and part == "qkv" else whole
    if left := sorted(set(found) - used):
        raise ConvertError(f"{folder}: this model has no place for {left[0]}, of {len(left)} such")
    return model_config, made


def check(folder, name, tensor, shape):
    """A tensor that was read, in fp32, if it is what the model needs. ConvertError."""
    if tensor is None:
        raise ConvertError(f"{folder} has no {name}")
    if not tensor.is_floating_point():
        raise ConvertError(f"{folder}: {name} is in {tensor.dtype}: quantized weights do not fit")
    if tuple(tensor.shape) != tuple(shape):
        raise ConvertError(f"{folder}: {name} is {tuple(tensor.shape)}, config.json says {tuple(shape)}")
    tensor = tensor.float()
    if why := not_finite(tensor):
        raise ConvertError(f"{folder}: {name} has {why}")
    return tensor


def one_key_a_head(pieces, head_dim):
    """[q, k, v] of heads that share keys and values -> the same with a copy for each; other lists as they are."""
    if len(pieces) < 3:
        return pieces
    q, *shared = pieces
    heads = [piece.unflatten(0, (-1, head_dim)) for piece in shared]
    return [q, *(head.repeat_interleave(len(q) // len(piece), 0).flatten(0, 1)
                 for head, piece in zip(heads, shared, strict=True))]  # fmt: skip


def halves_apart(qkv, config):
    """Rows of q, k and v, (3 n_embd, ...), whose rotary pairs are neighbours -> pairs half of the channels apart."""
    R, heads = config.rotary_dim, qkv.unflatten(0, (3, -1, config.head_dim))
    heads[:2, :, :R] = torch.cat((heads[:2, :, 0:R:2], heads[:2, :, 1:R:2]), dim=2)
    return qkv


def read_weights(folder):
    """{name: tensor} of a folder, mapped from the files without reading them. ConvertError."""
    paths = [path for name in WEIGHTS if (path := folder / name).is_file()]
    if not paths:
        raise ConvertError(f"{folder} has neither model.safetensors nor pytorch_model.bin")
    path = paths[0]
    read = read_bin if path.name.startswith("pytorch_model") else read_safetensors
    found, place = {}, {}
    for part in parts_of(path) if path.suffix == ".json" else [path]:
        for name, tensor in read(part).items():
            if name in found:
                raise ConvertError(f"{name} is in {place[name]} and in {part}")
            found[name], place[name] = tensor, part
    return found


def parts_of(index):
    """The files that an index names, all of them in its folder."""
    names = sorted({*files.read_json(index, {"weight_map": {...: str}})["weight_map"].values()})
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ConvertError(f"{index} names {name!r}, which is not in its folder")
        if not (index.parent / name).is_file():
            raise ConvertError(f"{index} names {name!r}, which is not there")
    return [index.parent / name for name in names]


def read_bin(path):
    """{name: tensor} of what torch.save wrote; other things are refused before they are looked up."""
    try:
        with warnings.catch_warnings(action="ignore"):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a pickle may raise any
        raise ConvertError(f"{path} is damaged, or holds more than tensors ({type(error).__name__})") from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ConvertError(f"{path} is no dict of tensors")
    for name, tensor in found.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ConvertError(f"{path}: {name} is no plain tensor")
    return {name: tensor.detach() for name, tensor in found.items()}


def read_safetensors(path):
    """{name: tensor} of a file in which every byte has its place, as the format demands. What torch has no dtype for
    comes as bytes. ConvertError."""
    with open(path, "rb") as f:
        size = f.seek(0, os.SEEK_END)
        data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY) if size else b""
    begin = 8 + int.from_bytes(data[:8], "little")
    try:
        if not 8 < begin <= min(size, LONGEST_HEADER):
            raise ValueError(f"{size:,} bytes, of which {begin - 8:,} should be its header")
        places = check_header(json.loads(data[8:begin], object_pairs_hook=without_doubles), size - begin)
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{path} is damaged, or of a newer format: {error}") from None
    found = {}
    for name, (dtype, shape, first, end) in places.items():
        if dtype not in DTYPES:
            dtype, shape = "U8", [end - first]
        if first == end:
            found[name] = torch.empty(shape, dtype=DTYPES[dtype])
        else:
            flat = torch.frombuffer(data, dtype=DTYPES[dtype], count=math.prod(shape), offset=begin + first)
            found[name] = flat.view(shape)
    return found


def without_doubles(pairs):
    """A JSON object's names and values as a dict. ValueError if a name comes twice."""
    names = [name for name, _ in pairs]
    if len({*names}) < len(names):
        raise ValueError(f"{max(names, key=names.count)} is there twice")
    return dict(pairs)


def check_header(header, size):
    """{name: (dtype, shape, first byte, end)} of a safetensors header and so many bytes behind it. ValueError unless
    the tensors fill these, one after another."""
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    places = {}
    for name, about in header.items():
        if name == "__metadata__":
            continue
        about = about if isinstance(about, dict) else {}
        dtype, shape, offsets = (about.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or dtype not in BITS:
            raise ValueError(f"{name} is of the unknown dtype {dtype!r:.80}")
        whole = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
        if not whole or not all(type(n) is int and n >= 0 for n in shape + offsets):
            raise ValueError(f"{name} has shape {shape!r:.80} and data_offsets {offsets!r:.80}")
        if offsets[1] - offsets[0] != -(-math.prod(shape) * BITS[dtype] // 8):
            raise ValueError(f"{name}, {shape} of {dtype}, does not fill bytes {offsets[0]} to {offsets[1]}")
        places[name] = (dtype, shape, *offsets)
    at = 0
    for name, (_, _, first, end) in sorted(places.items(), key=lambda item: item[1][2:]):
        if first != at:
            raise ValueError(f"{name} begins at byte {first}, what is before it ends at {at}")
        at = end
    if at != size:
        raise ValueError(f"its tensors take {at:,} bytes, it has {size:,}")
    return places


def tokenizer_of(source, config, target):
    """(encoding, what a checkpoint under `target` says of it) of a Hugging Face folder; (None, None) if it has none."""
    if ours := config.get("nanocrystal_tokenizer"):
        return tokenizer.find(ours), ours
    path = source / tokenizer.COPY
    if not path.exists():
        print(f"{source} has no tokenizer.json: the checkpoint has weights only")
        return None, None
    encoding = tokenizer.load(str(path))
    about = {"name": str(target / tokenizer.COPY), "vocab_size": encoding.n_vocab, "eot": tokenizer.eot(encoding)}
    return encoding, about | {"sha256": tokenizer.digest(encoding)}


def fit_rows(config, tensors, encoding):
    """Tell rows that only pad from those of the tokenizer's ids. Special ids beyond the last row, which no text is
    encoded to, get rows of zeros, and no probability before they are trained on."""
    n_rows, n_ids, needed = config.vocab_size, encoding.n_vocab, tokenizer.rows(encoding)
    if needed > n_rows:
        raise ConvertError(f"{encoding.name} has ids up to {needed - 1:,} for text, the embedding only {n_rows:,} rows")
    config.vocab_real = min(n_rows, n_ids)
    if n_ids > n_rows:
        print(f"{encoding.name} has {n_ids - n_rows:,} special ids beyond the {n_rows:,} rows of the embedding: added")
        config.vocab_size = n_ids
        for name in {"wte.weight", "head.weight"} & {*tensors}:
            tensors[name] = F.pad(tensors[name], (0, 0, 0, n_ids - n_rows))


def bring_in(source, config, target):
    """A Hugging Face folder and what its config.json says -> a checkpoint under `target`, which appears when it is
    whole."""
    encoding, about = tokenizer_of(source, config, target)
    model_config, tensors = from_hugging_face(source, config)
    if encoding:
        fit_rows(model_config, tensors, encoding)
    state = {
        "step": 0, "phase": target.name, "tokens": 0, "sample": 0, "start": {}, "first_token": 0, "drawn": {},
        "mix": {"sources": {}}, "model": dataclasses.asdict(model_config), "tokenizer": about,
        "config": {"data": "data", "mix": {}, "objective": {}}, "torch": torch.__version__,
    }  # fmt: skip
    with files.new_folder(target) as temporary:
        tokenizer.keep(encoding, temporary)
        copy_settings(encoding, temporary)
        checkpoint.save(temporary / "checkpoints", 0, {"model": tensors}, state, keep=1)
    knobs = {name: value for name, value in state["model"].items() if name != "vocab_real"}
    command = shlex.join([f"--init_from={target}", *(f"--{name}={value}" for name, value in knobs.items())])
    return f"""{sum(t.numel() for t in tensors.values()):,} parameters
to train on: python train.py <phase>.py {command}"""


@errors.command
def main(argv):
    parser = errors.Parser(__doc__)
    parser.add_argument("source", type=errors.path, help="out/<phase>, a checkpoint; or a Hugging Face folder")
    parser.add_argument("target", type=errors.path, help="a folder that does not exist yet")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of what goes out"
    )
    args = parser.parse_args(argv)
    if os.path.lexists(args.target):
        raise ConvertError(f"{args.target} exists; name a new folder")
    path, weights = args.source / "config.json", [name for name in WEIGHTS if (args.source / name).is_file()]
    if weights and not path.exists():
        raise ConvertError(f"{args.source} has {weights[0]} but no config.json, which says what model it is")
    config = files.read_json(path) if path.exists() else {}
    if weights or "model_type" in config:
        made = bring_in(args.source, config, args.target)
    else:
        made = export(args.source, args.target, getattr(torch, args.dtype))
    print(f"{args.target}: {made}")
    return 0


if __name__ == "__main__":
    errors.run(main)
