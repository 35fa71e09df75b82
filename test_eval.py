"""What eval.py promises: its numbers against arithmetic done another way, and against others' programs if installed."""

import itertools
import json
import math
import os
import random
import shutil
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

import eval as evaluation
import tokenizer
import train
from conftest import losses, run
from model import GPT, GPTConfig, init_weights
from test_processes import trained

ENCODING = tokenizer.load(vocab_size=512)
EOT = tokenizer.eot(ENCODING)


@pytest.fixture(scope="module")
def model():
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=640, vocab_real=ENCODING.n_vocab)
    model = GPT(config).eval()
    init_weights(model, seed=1)
    return model


def alone(model, context, ids):
    """Sum of log-probabilities of ids after a context, and whether all are the likeliest, from one plain pass."""
    whole = torch.tensor([*context, *ids])[-model.config.block_size - 1 :]
    logs = model(whole[None, :-1])[0].log_softmax(-1)[-len(ids) :]
    goal = whole[-len(ids) :][-len(logs) :]
    return logs.gather(1, goal[:, None]).sum().item(), bool((logs.argmax(1) == goal).all())


def test_packed_continuations_have_the_likelihoods_that_each_has_alone(model):
    dice = random.Random(0)

    def ids(least, most):
        return [dice.randrange(500) for _ in range(dice.randint(least, most))]

    asked = [([EOT, *ids(0, 30)], [ids(1, 12) for _ in range(dice.randint(1, 5))]) for _ in range(200)]
    asked += [([EOT, *ids(60, 90)], [ids(1, 12), ids(20, 30)]), ([EOT], [ids(70, 90)]), ([EOT], [ids(64, 64)])]
    asked += [([EOT, 5], [[], [6]])]  # nothing has the likelihood 1
    logs, greedy = evaluation.log_likelihoods(model, asked, tokens_per_batch=256)
    assert logs[-2] == 0 and greedy[-2]
    logs, greedy, asked[-1] = np.delete(logs, -2), np.delete(greedy, -2), ([EOT, 5], [[6]])
    expected = [alone(model, context, some) for context, many in asked for some in many]
    assert np.abs(logs - [log for log, _ in expected]).max() < 1e-4
    assert greedy.tolist() == [right for _, right in expected]
    rows = evaluation.pack(asked, 64)
    assert len(rows) < len(logs) / 3  # and does so in far fewer rows


def test_a_model_that_knows_nothing_gives_every_token_one_in_its_vocabulary(model):
    blank = GPT(model.config).eval()
    for p in blank.parameters():
        torch.nn.init.zeros_(p)
    asked = [([EOT, 1, 2], [[3], [4, 5, 6]]), ([EOT], [[7] * 64])]
    logs, _ = evaluation.log_likelihoods(blank, asked)
    assert logs == pytest.approx([-n * math.log(ENCODING.n_vocab) for n in (1, 3, 64)])


def test_contexts_and_continuations_are_cut_as_one_text():
    encode = ENCODING.encode_ordinary
    for context, continuation, body, rest in (
        ("The cat", " sat", "The cat", " sat"),
        ("def f(x):\n", "    return x", "def f(x):", "    return x"),  # "):" and "):\n" are one token each
        ("", "word", "", "word"),
        ("a  ", "b", "a", "  b"),
    ):
        head, ids = evaluation.split(encode, context, continuation)
        assert (ENCODING.decode(head), ENCODING.decode(ids)) == (body, rest)
    joined = encode("return")
    assert evaluation.split(encode, "retu", "rn")[1] == joined[len(encode("retu")) :]


@pytest.mark.parametrize("n, c, k", [(1, 0, 1), (5, 2, 1), (5, 2, 3), (7, 7, 2), (6, 4, 3)])
def test_pass_at_k_is_the_share_of_k_subsets_with_a_right_one(n, c, k):
    subsets = list(itertools.combinations(range(n), k))
    assert evaluation.pass_at(k, n, c) == pytest.approx(sum(min(s) < c for s in subsets) / len(subsets))


def test_a_task_is_read_scored_and_summed_up_by_hand(tmp_path, model, monkeypatch):
    examples = [
        {"kind": "choice", "id": n, "context": "c", "sep": " ", "choices": ["a", "bb", "cc"], "answer": n % 2}
        for n in range(4)
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(e) + "\n" for e in examples))
    (task,) = evaluation.read_tasks(tmp_path, ["t"], None)
    logs = np.array([[-1, -3, -5], [-1, -3, -5], [-2, -2, -2], [-9, -4, -3]], float)
    monkeypatch.setattr(evaluation, "log_likelihoods", lambda *args: (logs.flatten(), logs.flatten() < 0))
    items = evaluation.score(task, model, ENCODING, "psm", None, 1024)
    assert items["acc"] == [1, 0, 1 / 3, 0] and items["given"] == [0, 0, 0, 2]
    assert items["acc_norm"] == [1, 0, 0, 0]  # -1 -1.5 -2.5; the same; -2 -1 -1; -9 -2 -1.5
    assert items["p"] == pytest.approx(
        [0.8668, 0.1173, 1 / 3, math.exp(-4) / sum(map(math.exp, (-9, -4, -3)))], abs=1e-4
    )
    assert items["bits"] == pytest.approx([1 / math.log(2), 3 / math.log(2), 2 / math.log(2), 4 / math.log(2)])
    assert items["bytes"] == [2, 3, 2, 3]
    made = evaluation.summary(task, items)
    assert made["scores"]["acc"]["mean"] == pytest.approx(1 / 3)
    assert made["scores"]["acc"]["se"] == pytest.approx(np.std([1, 0, 1 / 3, 0], ddof=1) / 2)
    assert made["scores"]["bpb"]["mean"] == pytest.approx((0.5 + 1 + 1 + 4 / 3) / 4 / math.log(2))
    assert (made["chance"], made["constant"]) == (pytest.approx(1 / 3), 0.5)
    assert made["entropy"] == pytest.approx(-(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)))


def test_texts_are_scored_token_by_token_with_windows_of_full_contexts(model):
    ids = [EOT, *random.Random(1).choices(range(500), k=150)]
    asked = evaluation.requests({"ids": ids}, "text", None, EOT, None, None, 64)
    assert [t for _, (some,) in asked for t in some] == ids[1:]  # each once
    assert [len(context) for context, _ in asked] == [1, 1, 64 + 1 - 22]
    logs, _ = evaluation.log_likelihoods(model, asked)
    assert logs == pytest.approx([alone(model, context, some)[0] for context, (some,) in asked], abs=1e-3)


@pytest.mark.parametrize(
    "lines, word",
    [
        ("{", "is not JSON lines"),
        ('{"kind": "riddle"}', "'riddle', which is none of choice"),
        ('{"kind": "text"}', "line 1, lacks text"),
    ],
)
def test_task_files_that_cannot_be_read_are_named(tmp_path, lines, word):
    (tmp_path / "t.jsonl").write_text(lines + "\n")
    with pytest.raises(evaluation.EvalError, match=word):
        evaluation.read_tasks(tmp_path, ["t"], None)
    with pytest.raises(evaluation.EvalError, match="no task or group 'u'; it has t"):
        evaluation.read_tasks(tmp_path, ["u"], None)


# ------------------------------------------------------------------------------------------------ others' programs


def made_up_tasks(folder):
    """Files of small tasks of the kinds that lm-evaluation-harness knows too; NANOCRYSTAL_TASKS names real ones."""
    dice = random.Random(0)
    words = ["the", "def", "return", "naïve", "x", "=", "1", "(", ")", ":", "cat", "日本", "sat\non\tmat"]

    def text(n):
        return " ".join(dice.choices(words, k=n)).strip()

    def choices():
        return [text(dice.randint(1, 9)) for _ in range(4)]

    kinds = {
        "choice": lambda: dict(context=text(dice.randint(0, 60)), sep=" ", choices=choices(), answer=dice.randrange(4)),
        "schema": lambda: dict(contexts=[text(9), text(8)], sep=" ", continuation=text(5), answer=dice.randrange(2)),
        "completion": lambda: dict(context=text(30), sep=" ", answer=text(3)),
        "text": lambda: dict(text=text(200)),
    }
    for kind, make in kinds.items():
        lines = [json.dumps({"kind": kind, "task": kind, "id": n, **make()}) for n in range(20)]
        (folder / f"{kind}.jsonl").write_text("\n".join(lines) + "\n")
    return [*kinds]


def harness_of(model):
    """A model for lm-evaluation-harness: one plain pass a request, through its own way from texts to ids."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class Ours(TemplateLM):
        eot_token_id, max_length = EOT, model.config.block_size

        def tok_encode(self, string, **_):
            return ENCODING.encode_ordinary(string)

        def _loglikelihood_tokens(self, requests, **_):
            return [alone(model, context, ids) for _, context, ids in requests]

        def _encode_pair(self, context, continuation):
            head, rest = super()._encode_pair(context, continuation)
            return [EOT, *head] if context else head, rest

        def loglikelihood_rolling(self, requests, **_):
            totals = []
            for request in requests:
                windows = get_rolling_token_windows(self.tok_encode(request.args[0]), EOT, self.max_length, 1)
                totals.append(sum(alone(model, *map(list, make_disjoint_window(w)))[0] for w in windows))
            return totals

        def generate_until(self, requests, **_):
            raise NotImplementedError

    return Ours()


def harness_config(task, path):
    """A task file as lm-evaluation-harness describes it, and the measures that are ours as well."""
    kinds = {
        "choice": ("multiple_choice", "{{context}}", "answer", "choices", ("acc", "acc_norm")),
        "schema": ("multiple_choice", "answer", "continuation", "contexts", ("acc",)),
        "completion": ("loglikelihood", "{{context}}", "{{sep}}{{answer}}", None, ("acc",)),
        "text": ("loglikelihood_rolling", "", "{{text}}", None, ()),
    }
    output_type, doc_to_text, doc_to_target, doc_to_choice, measures = kinds[task.kind]
    config = dict(
        task=task.name, dataset_path="json", dataset_kwargs={"data_files": {"test": str(path)}}, test_split="test",
        num_fewshot=0, output_type=output_type, doc_to_text=doc_to_text, doc_to_target=doc_to_target,
        target_delimiter="" if task.kind == "completion" else task.examples[0].get("sep", ""),
        metric_list=[{"metric": measure} for measure in measures or ("bits_per_byte",)],
    )  # fmt: skip
    return config | ({"doc_to_choice": doc_to_choice} if doc_to_choice else {}), measures


def test_log_likelihoods_and_accuracies_are_those_of_lm_evaluation_harness(model, tmp_path):
    """pip install lm_eval==0.4.13; NANOCRYSTAL_TASKS=FOLDER:piqa,winograd,lambada,wikitext2 for files of your own."""
    pytest.importorskip("lm_eval")
    from lm_eval import evaluator

    folder, _, names = os.environ.get("NANOCRYSTAL_TASKS", f"{tmp_path}:").partition(":")
    names = names.split(",") if names else made_up_tasks(tmp_path)
    for task in evaluation.read_tasks(Path(folder), names, 20):
        config, measures = harness_config(task, next(Path(folder).glob(f"{task.name}.jsonl*")))
        theirs = evaluator.simple_evaluate(
            harness_of(model), tasks=[config], limit=20, log_samples=True, bootstrap_iters=0
        )
        items = evaluation.score(task, model, ENCODING, "psm", None, 1024)
        samples = sorted(theirs["samples"][task.name], key=lambda sample: sample["doc_id"])
        for sample_, logs in zip(samples, items["logs"], strict=True):
            answers = [r[0] if isinstance(r, (list, tuple)) else r for r in sample_["filtered_resps"]]
            ours = [sum(logs)] if task.kind == "text" else logs
            assert ours == pytest.approx([float(a) for a in answers], rel=1e-7, abs=1e-3)
            for measure in measures:
                assert sample_[measure] == items[measure][sample_["doc_id"]]


# ------------------------------------------------------------------------------------------------- from end to end


def test_training_scores_tasks_as_eval_does_and_as_on_one_process(phases, tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    for n, name in enumerate(("piqa", "conala")):
        kinds = made_up_tasks(folder)
        (folder / f"{kinds[2 * n]}.jsonl").rename(folder / f"{name}.jsonl")
    knobs = {"eval_tasks": str(folder), "eval_examples": 12, "share": 0.1}
    trained(phases("a", **knobs))
    assert train.main(phases("a", out="one", micro_batch=8, **knobs)) == 0
    two, one = ([r["tasks"] for r in losses(tmp_path / out, "a") if "tasks" in r] for out in ("out", "one"))
    assert len(one) == len(two) == 2 and one[0].keys() == {"piqa", "conala"}
    for a, b in zip(one, two, strict=True):
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-4)
    path = tmp_path / "result.json"
    command = ["eval.py", tmp_path / "one/a", f"--data={folder}", "--tasks=quick", "--limit=12", f"--out={path}"]
    assert run(*command).returncode == 0
    results = json.loads(path.read_text())
    for name, scores in one[-1].items():
        assert results["tasks"][name]["scores"]["bpb"]["mean"] == pytest.approx(scores["bpb"], rel=1e-4)
        assert results["tasks"][name]["scores"]["acc"]["mean"] == scores["acc"]
    done = results["tasks"].pop("conala")  # as if it had been killed before the last task
    results["tasks"]["piqa"]["scores"]["acc"]["mean"] = 77.0
    path.write_text(json.dumps(results))
    again = run(*command)
    assert again.returncode == 0 and "7700.0" in again.stdout  # taken over, not done again
    assert json.loads(path.read_text())["tasks"]["conala"]["items"] == done["items"]
    other = run(*command, "--dtype=bfloat16")
    assert other.returncode == 2 and "has results of other weights or settings" in other.stderr
    compared = run("eval.py", "--compare", path, path)
    assert compared.returncode == 0 and "+0.0000  [+0.0000, +0.0000]  n 12" in compared.stdout


def test_held_out_parts_have_the_bits_that_training_logged(phases, data, tmp_path):
    assert train.main(phases("a", share=0.1, objective="{'code': 'fim(0.5)'}")) == 0
    logged = [r["val"] for r in losses(tmp_path / "out", "a") if "val" in r][-1]
    windows = logged["code"]["tokens"] // 32
    done = run("eval.py", tmp_path / "out/a", f"--limit={windows}", f"--samples={tmp_path / 's.jsonl'}", "--generate")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out/a").glob("eval-*.json")
    tasks = json.loads(path.read_text())["tasks"]
    for name in ("text", "code"):
        assert tasks[name]["scores"]["bpb"]["mean"] == pytest.approx(logged[name]["bpb"], rel=1e-4)
    assert {"stops", "exact"} <= tasks["code_spans"]["scores"].keys()
    lines = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert len(lines) == sum(task["n"] for task in tasks.values())
    shutil.copytree(data, tmp_path / "other")
    record = tmp_path / "other/text/meta.json"
    record.write_text(record.read_text().replace(tokenizer.digest(ENCODING), "0" * 64))
    done = run("eval.py", tmp_path / "out/a", f"--sources={tmp_path / 'other'}", "--fresh")
    assert done.returncode == 2 and "ids of another tokenizer" in done.stderr


def test_code_is_written_cut_and_run(model, tmp_path, monkeypatch):
    examples = [{"kind": "code", "id": "a", "prompt": "def f(x):\n", "solution": "    return 2 * x\n",
                 "tests": "assert f(2) == 4"}] * 2  # fmt: skip
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(e) + "\n" for e in examples))
    (task,) = evaluation.read_tasks(tmp_path, ["t"], None)
    texts = ["\n    return 2 * x\n\nprint(f(3)", "\n    return x", "\n    return x + x", "\n    return x * 2\n# and"]
    scripts = [ENCODING.encode_ordinary(text) for text in texts]

    def generate(prompts, *_):
        assert all(ENCODING.decode(ids[1:]) == "def f(x):" for ids in prompts)
        yield from itertools.zip_longest(*scripts)

    monkeypatch.setattr(model, "generate", generate)
    args = evaluation.parse(["x", "--run-code", "--samples_per_task=2"])
    programs = evaluation.write_programs(task, model, ENCODING, args)
    assert programs[0] == [
        "def f(x):\n    return 2 * x\n\nassert f(2) == 4",
        "def f(x):\n    return x\nassert f(2) == 4",
    ]
    assert evaluation.run_programs(programs, 5.0, (1, 2, 3)) == {"pass@1": [0.5, 1.0], "pass@2": [1.0, 1.0]}


@pytest.mark.parametrize(
    "arguments, word",
    [
        (("nothing",), "nothing"),
        ((), "which checkpoint"),
        (("x", "--limit=0"), "--limit is above 0"),
        (("--compare", "no.json", "no.json"), "no.json"),
    ],
)
def test_bad_input_gets_one_line(arguments, word):
    done = run("eval.py", *arguments)
    assert done.returncode == 2 and word in done.stderr and "Traceback" not in done.stderr


def test_a_program_that_a_text_asks_for_is_not_over_at_its_first_line(model, tmp_path, monkeypatch):
    example = {"kind": "code", "prompt": '"""\nDouble.\n"""\n', "solution": "x", "tests": "assert double(2) == 4"}
    (tmp_path / "t.jsonl").write_text(json.dumps(example) + "\n" + json.dumps(example | {"lang": "go"}) + "\n")
    task = evaluation.read_tasks(tmp_path, ["t"], 1)[0]
    body = ENCODING.encode_ordinary("\ndef double(x):\n    return 2 * x\n\nassert double(1) == 3\n")
    monkeypatch.setattr(model, "generate", lambda prompts, *_: ([token] for token in body))
    args = evaluation.parse(["x", "--run-code"])
    assert evaluation.runs(task, args) and not evaluation.runs(evaluation.read_tasks(tmp_path, ["t"], 2)[0], args)
    (programs,) = evaluation.write_programs(task, model, ENCODING, args)
    assert programs == ['"""\nDouble.\n"""\ndef double(x):\n    return 2 * x\n\nassert double(2) == 4']
    assert evaluation.run_programs([programs], 5.0) == {"pass@1": [1.0]}


def test_tasks_are_scored_also_where_no_source_has_a_held_out_part(phases, data, tmp_path):
    for name in ("text", "code"):
        (tmp_path / "bare" / name).mkdir(parents=True)
        for path in (data / name).glob("train*"):
            (tmp_path / "bare" / name / path.name).symlink_to(path)
        meta = json.loads((data / name / "meta.json").read_text())
        meta["val"] = {"tokens": 0, "documents": 0, "bytes": 0, "shards": []}
        (tmp_path / "bare" / name / "meta.json").write_text(json.dumps(meta))
    (tmp_path / f"{made_up_tasks(tmp_path)[0]}.jsonl").rename(tmp_path / "piqa.jsonl")
    knobs = {"eval_tasks": str(tmp_path), "eval_examples": 5, "share": 0.1, "data": str(tmp_path / "bare")}
    assert train.main(phases("a", **knobs)) == 0
    assert [r["tasks"].keys() for r in losses(tmp_path / "out", "a") if "tasks" in r] == [{"piqa"}] * 2
