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
The new checkpoint is at step 0 of no phase, in fp32.

What one side cannot represent is refused, with the reason.
"""

import dataclasses
import itertools
import json
import mmap
import pickle
import shutil
import zipfile
from pathlib import Path

import torch

import checkpoint
import errors
import files
import tokenizer
from errors import UserError
from model import EMBEDDING_SCALE, GPT, LOGIT_SCALE, GPTConfig
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
          "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip


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
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end, "pad_token": end,
        "model_max_length": block_size, "clean_up_tokenization_spaces": False, "split_special_tokens": True,
    }  # fmt: skip
    return {"tokenizer.json": whole, "tokenizer_config.json": about}


def parts(token, ranks):
    """The two tokens that byte-pair encoding joins last when it makes a token."""
    pieces = [token[i : i + 1] for i in range(len(token))]
    while len(pieces) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(pieces)]
        i = pairs.index(min(pairs))
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


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
    contents = {"config.json": config | {"dtype": str(dtype).split(".")[1], "torch_dtype": str(dtype).split(".")[1]}}
    temporary = new_folder(target)
    if encoding is None:
        print("the checkpoint's data named no tokenizer, so there is none to write")
    else:
        ends = {"bos_token_id": tokenizer.start(encoding), "eos_token_id": tokenizer.eot(encoding)}
        ends["pad_token_id"] = ends["eos_token_id"]
        contents["config.json"] |= ends
        contents["generation_config.json"] = ends
        if isinstance(encoding, tokenizer.FileEncoding):
            copy_tokenizer(Path(encoding.name).parent, temporary)
        else:
            contents |= tokenizer_files(encoding, model.config.block_size)
            contents["config.json"]["nanocrystal_tokenizer"] = state["tokenizer"]
    for name, content in contents.items():
        files.write_json(temporary / name, content)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    write_safetensors(temporary / "model.safetensors", tensors)
    temporary.rename(target)
    return f"{config['architectures'][0]}, {sum(t.numel() for t in tensors.values()):,} numbers in {dtype}"


# ------------------------------------------------------------------------------------------------------------------ in


def require(config, **needed):
    """Every knob of a config.json, or its default there, is what our model does: name=(default, what is possible)."""
    for name, (default, possible) in needed.items():
        value = default if config.get(name) is None else config[name]
        if value not in possible:
            raise ConvertError(f"{name} is {value!r}; this model can only do {' or '.join(map(repr, possible))}")


def from_config(config):
    """config.json as a dict -> (knobs of GPTConfig but for bias, LLAMA or CRYSTAL, where their blocks are, whether
    rotary pairs are neighbours). ConvertError says what does not fit."""
    kind = config["model_type"]
    if kind == "crystalcoder":
        require(
            config, position_embedding_type=("learned", ["rotary"]), activation_function=("gelu_new", ["swiglu"]),
            layer_norm_epsilon=(1e-5, [1e-5]), scale_attn_weights=(True, [True]),
            scale_attn_by_inverse_layer_idx=(False, [False]), mup_scale_qk_dot_by_d=(False, [True]),
            mup_embeddings_scale=(1.0, [EMBEDDING_SCALE]), mup_output_alpha=(1.0, [LOGIT_SCALE]),
        )  # fmt: skip
        knobs = {ours: config[ours] for ours in ("n_layer", "n_head", "n_embd", "n_inner", "vocab_size")}
        knobs |= {"block_size": config["n_positions"], "tie": config.get("tie_word_embeddings", True)}
        knobs["mup_base"] = round(config["mup_width_scale"] * config["n_embd"])
        knobs["rotary"] = config["rotary_dim"] / (config["n_embd"] // config["n_head"])
        return knobs, CRYSTAL, "transformer.h", True
    if kind not in ("llama", "stablelm"):
        reason = "GPT-2 has learned positions and an MLP without gate; " if kind == "gpt2" else ""
        raise ConvertError(f"model_type {kind!r} does not fit: {reason}there are crystalcoder, llama and stablelm")
    rope = {**config, **(config.get("rope_parameters") or config.get("rope_scaling") or {})}
    require(rope, rope_theta=(10000.0, [10000.0]), rope_type=(rope.get("type", "default"), ["default"]))
    heads, width = config["num_attention_heads"], config["hidden_size"]
    require(config, hidden_act=("silu", ["silu"]), head_dim=(width // heads, [width // heads]))
    if kind == "llama":
        require(config, rms_norm_eps=(1e-6, [1e-5]))
        knobs = {"norm": "rmsnorm", "rotary": 1.0}
    else:
        require(config, layer_norm_eps=(1e-5, [1e-5]), qk_layernorm=(False, [False]))
        knobs = {
            "rotary": rope.get("partial_rotary_factor", 0.25),
            "parallel": config.get("use_parallel_residual", False),
        }
    knobs |= {
        "n_layer": config["num_hidden_layers"], "n_head": heads, "n_embd": width, "mup_base": 0,
        "n_inner": config["intermediate_size"], "vocab_size": config["vocab_size"],
        "block_size": config["max_position_embeddings"], "tie": config.get("tie_word_embeddings", False),
    }  # fmt: skip
    return knobs, LLAMA, "model.layers", False


def from_hugging_face(folder, config):
    """A folder and what its config.json says -> (GPTConfig, {our parameter's name: fp32 tensor}). ConvertError."""
    try:
        knobs, layout, blocks, neighbours = from_config(config)
        found = read_weights(folder)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ConvertError(f"{folder}: config.json, or an index beside it, lacks something: {error!r}") from None
    used = {"lm_head.weight"} if knobs["tie"] else set()  # there it is a copy
    used |= {name for name in found if name.endswith(BUFFERS)}
    biases = {name for name in found if name.endswith(".bias")} - used
    used |= {name for name in biases if not found[name].any()}
    model_config = GPTConfig(**knobs, bias=bool(biases - used))
    with torch.device("meta"):
        model = GPT(model_config)
    made = {}
    for name, p in model.named_parameters():
        theirs, part = place(name, layout, blocks)
        used |= {*theirs}
        if name.endswith("bias") and theirs[0] not in found:
            made[name] = torch.zeros(p.shape)
            continue
        if lacking := [one for one in theirs if one not in found]:
            raise ConvertError(f"{folder} has no {lacking[0]}")
        if quantized := [one for one in theirs if not found[one].is_floating_point()]:
            raise ConvertError(
                f"{folder}: {quantized[0]} is in {found[quantized[0]].dtype}: quantized weights do not fit"
            )
        pieces = [found[one].float() for one in theirs]
        if layout is CRYSTAL and p.dim() == 2 and part not in ("wte", "head"):
            pieces = [piece.T for piece in pieces]
        whole = torch.cat(one_key_a_head(pieces, model_config.head_dim) if part == "qkv" else pieces)
        if whole.shape != p.shape:
            raise ConvertError(
                f"{folder}: {' + '.join(theirs)} is {tuple(whole.shape)}, config.json says {tuple(p.shape)}"
            )
        made[name] = halves_apart(whole, model_config) if neighbours and part == "qkv" else whole
    if left := sorted(set(found) - used):
        raise ConvertError(f"{folder}: this model has no place for {left[0]}, of {len(left)} such")
    return model_config, made


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
    """{name: tensor} of a folder, mapped from the files without reading them."""
    for name, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_bin)):
        if (index := folder / f"{name}.index.json").exists():
            files = sorted({*json.loads(index.read_text())["weight_map"].values()})
        else:
            files = [name] if (folder / name).exists() else []
        if files:
            return {key: tensor for file in files for key, tensor in read(folder / file).items()}
    raise ConvertError(f"{folder} has neither model.safetensors nor pytorch_model.bin")


def read_bin(path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ConvertError(f"{path} is damaged, or holds more than tensors ({type(error).__name__})") from None


def read_safetensors(path):
    try:
        with open(path, "rb") as f:
            data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        begin, found = 8 + int.from_bytes(data[:8], "little"), {}
        for name, about in json.loads(data[8:begin]).items():
            if name != "__metadata__":
                at, end = about["data_offsets"]
                dtype = DTYPES[about["dtype"]]
                flat = torch.frombuffer(data, dtype=dtype, count=(end - at) // dtype.itemsize, offset=begin + at)
                found[name] = flat.view(about["shape"])
    except (ValueError, KeyError, RuntimeError) as error:
        raise ConvertError(f"{path} is damaged, or of a newer format: {error!r}") from None
    return found


def tokenizer_of(source, config, target):
    """What a checkpoint under `target` says of its tokenizer; None if there is none."""
    if ours := config.get("nanocrystal_tokenizer"):
        return ours
    if not (source / "tokenizer.json").exists():
        print(f"{source} has no tokenizer.json: the checkpoint has weights only")
        return None
    encoding = tokenizer.load(str(source / "tokenizer.json"))
    about = {"name": str(target / "tokenizer.json"), "vocab_size": encoding.n_vocab, "eot": tokenizer.eot(encoding)}
    return about | {"sha256": tokenizer.digest(encoding)}


def bring_in(source, config, target):
    """A Hugging Face folder and what its config.json says -> a checkpoint under `target`, which appears when it is
    whole."""
    about, (model_config, tensors) = tokenizer_of(source, config, target), from_hugging_face(source, config)
    state = {
        "step": 0, "phase": target.name, "tokens": 0, "sample": 0, "start": {}, "first_token": 0, "drawn": {},
        "mix": {"sources": {}}, "model": dataclasses.asdict(model_config), "tokenizer": about,
        "config": {"data": "data", "mix": {}, "objective": {}}, "torch": torch.__version__,
    }  # fmt: skip
    temporary = new_folder(target)
    if about and about["name"].endswith(".json"):
        copy_tokenizer(source, temporary)
    checkpoint.save(temporary / "checkpoints", 0, {"model": tensors}, state, keep=1)
    temporary.rename(target)
    knobs = {name: value for name, value in state["model"].items() if name != "vocab_real"}
    return f"""{sum(t.numel() for t in tensors.values()):,} parameters
to train on: python train.py <phase>.py --init_from={target} {" ".join(f"--{k}={v}" for k, v in knobs.items())}"""


def new_folder(target):
    """An empty folder beside `target`, to be renamed when all is in it."""
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def copy_tokenizer(source, target):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (source / name).exists():
            shutil.copy(source / name, target)


@errors.command
def main(argv):
    parser = errors.Parser(__doc__)
    parser.add_argument("source", type=errors.path, help="out/<phase>, a checkpoint; or a Hugging Face folder")
    parser.add_argument("target", type=errors.path, help="a folder that does not exist yet")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of what goes out"
    )
    args = parser.parse_args(argv)
    if args.target.exists():
        raise ConvertError(f"{args.target} exists; name a new folder")
    path = args.source / "config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    if "model_type" in config:
        made = bring_in(args.source, config, args.target)
    else:
        made = export(args.source, args.target, getattr(torch, args.dtype))
    print(f"{args.target}: {made}")
    return 0


if __name__ == "__main__":
    errors.run(main)
