"""Which mixture? Fits bits per byte of every source to the weights of finished runs, says how well that predicts
mixtures it has not seen, and proposes one (the idea of RegMix, arXiv 2407.01492).

    python study.py study/shares.py                          # some mixtures, over seeds
    python mixture.py studies --goal text=0.5,code=0.5       # the least mean of bits per byte, weighted like this

Features are log-ratios of the weights to the first source's, and their squares and products where there are mixtures
enough; least squares with a ridge, chosen by what predicts best. Errors are of mixtures left out with all their seeds,
of the choice as well as of the fit.
What is proposed lies between the mixtures that were tried: beyond them nothing is known.
"""

import itertools
import math
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np

import errors
import files
from errors import UserError

ABSENT = 0.01  # added to every weight, so that the logarithm of none is finite
RIDGES = (1e-6, 1e-4, 1e-2, 1e-1, 1.0)


def is_mix(value):
    return not files.misfit(value, {...: files.real}) and sum(value.values()) > 0 and min(value.values()) >= 0


RESULT = {"evaluation": {"key": str}, "measures": {...: files.number}}  # shapes of what study.py writes
TRAINED = {"parent": (str, None), "decides": str, "mix": is_mix}


class MixtureError(UserError):
    """Too few runs, or a goal that names none of their sources; in one line."""


def finished(folder):
    """{mixture as ((source, share), ...): [{measure: value} of every seed]} of the runs from scratch under a folder
    that differ in nothing but mixture and seed; the largest such family, of those with as many mixtures the one with
    most runs."""
    families = defaultdict(lambda: defaultdict(list))
    for path in sorted(Path(folder).glob("*/result-*.json")):
        result, run = files.read_json(path, RESULT), files.read_json(path.parent / "trained.json", TRAINED)
        if not all(map(files.real, result["measures"].values())):
            print(f"left out {path}, whose measures are no numbers: it has diverged")
        elif not run["parent"]:
            family = families[run["decides"], result["evaluation"]["key"]]
            total = sum(run["mix"].values())
            mix = {source: round(weight / total, 6) for source, weight in run["mix"].items() if weight}
            family[tuple(sorted(mix.items()))].append(result["measures"])
    if not families:
        raise MixtureError(f"{folder} has no finished runs from scratch; see study.py")
    return dict(max(families.values(), key=lambda family: (len(family), sum(map(len, family.values())))))


def features(weights, degree):
    """Weights (n, sources) -> (n, features): a constant, log-ratios to the first source; degree 2: and products."""
    ratios = np.log((weights[:, 1:] + ABSENT) / (weights[:, :1] + ABSENT))
    columns = [np.ones(len(weights)), *ratios.T]
    if degree == 2:
        columns += [a * b for a, b in itertools.combinations_with_replacement(ratios.T, 2)]
    return np.stack(columns, axis=1)


def ridge(x, y, strength):
    """Coefficients (features,) of least squares with a penalty on all but the constant."""
    penalty = strength * np.eye(x.shape[1])
    penalty[0, 0] = 0
    return np.linalg.solve(x.T @ x + penalty, x.T @ y)


def left_out(weights, y, predict):
    """What is predicted for every mixture from the others, (n,). predict: function of weights and y of some mixtures
    and weights (m, sources) of others to values (m,)."""
    made = np.empty(len(y))
    for i in range(len(y)):
        others = np.arange(len(y)) != i
        (made[i],) = predict(weights[others], y[others], weights[i : i + 1])
    return made


def with_settings(degree, strength):
    def predict(weights, y, others):
        return features(others, degree) @ ridge(features(weights, degree), y, strength)

    return predict


def fit_predict(weights, y, others):
    """Values (m,) at weights `others` (m, sources), fitted to weights (n, sources) and y (n,), with the degree and the
    ridge that predict best what is left out of these."""
    degrees = [d for d in (1, 2) if features(weights, d).shape[1] < len(y)]
    if not degrees:
        raise MixtureError(f"too few mixtures of {weights.shape[1]} sources to predict another from")
    tried = [with_settings(degree, strength) for degree in degrees for strength in RIDGES]
    best = min(tried, key=lambda predict: np.abs(left_out(weights, y, predict) - y).mean())
    return best(weights, y, others)


def propose(weights, predict, goal, count=20_000, seed=1):
    """The best of many mixtures drawn between those that were tried, ever nearer to the best -> (weights (sources,),
    goal's value there).

    predict: {measure: function}; goal: {measure: weight}, summing to 1.
    """
    dice, best, least = np.random.default_rng(seed), weights.mean(0), math.inf
    for step in (1.0, 0.3, 0.1, 0.03):
        some = np.concatenate([weights, dice.dirichlet(np.full(len(weights), 0.1), count) @ weights])
        some = best + step * (some - best)
        values = sum(share * predict[measure](some) for measure, share in goal.items())
        if values.min() < least:
            best, least = some[values.argmin()], values.min()
    return best, least


def parse_goal(text, measures):
    """ "text=3,code=1" -> {"text": 0.75, "code": 0.25}; none: all measures alike."""
    try:
        goal = {name: float(share) for name, _, share in (part.partition("=") for part in text.split(",") if part)}
    except ValueError:
        raise MixtureError(f"--goal={text}: write source=share,source=share") from None
    goal = goal or dict.fromkeys(measures, 1.0)
    if unknown := [name for name in goal if name not in measures]:
        raise MixtureError(f"--goal names {unknown[0]}; measured are {', '.join(measures)}")
    total = sum(goal.values())
    if not (0 < total < math.inf and min(goal.values()) >= 0):
        raise MixtureError(f"--goal={text}: shares are not below 0 and not all 0")
    return {name: share / total for name, share in goal.items()}


@errors.command
def main(argv):
    parser = errors.Parser(__doc__)
    parser.add_argument("folder", type=errors.path, help="of runs that study.py has made")
    parser.add_argument("--goal", default="", help="what is to be low, source=share,...; default: all sources alike")
    args = parser.parse_args(argv)
    runs = finished(args.folder)
    sources = sorted({source for mix in runs for source, _ in mix})
    weights = np.array([[dict(mix).get(source, 0.0) for source in sources] for mix in runs])
    measured = [one for some in runs.values() for one in some]
    measures = [source for source in measured[0] if source in sources and all(source in one for one in measured)]
    if not measures:
        raise MixtureError(f"the runs in {args.folder} were not evaluated on their sources")
    goal = parse_goal(args.goal, measures)
    print(f"{len(runs)} mixtures of {', '.join(sources)}, {sum(map(len, runs.values()))} runs")
    print(
        f"{'bits per byte of':<20}{'from':>8}{'to':>8}{'error, left out':>18}{'correlation':>13}{'seeds alone':>13}"
    )
    predict = {}
    for name in measures:
        seeds = [np.array([one[name] for one in some]) for some in runs.values()]
        y = np.array([values.mean() for values in seeds])
        predict[name], guesses = partial(fit_predict, weights, y), left_out(weights, y, fit_predict)
        spread = [values.var(ddof=1) / len(values) for values in seeds if len(values) > 1]
        noise = math.sqrt(np.mean(spread or [math.nan]) * 2 / math.pi)  # mean absolute error of a mean over seeds
        error, alike = np.abs(guesses - y).mean(), np.corrcoef(guesses, y)[0, 1]
        print(f"{name:<20}{y.min():8.3f}{y.max():8.3f}{error:18.4f}{alike:13.3f}{noise:13.4f}")
    best, value = propose(weights, predict, goal)
    tried = {name: np.array([np.mean([one[name] for one in some]) for some in runs.values()]) for name in goal}
    values = sum(share * tried[name] for name, share in goal.items())
    wanted = ", ".join(f"{share:.3g} {name}" for name, share in goal.items())
    print(
        f"least of {wanted}: {value:.4f} predicted at",
        {s: round(float(w), 3) for s, w in zip(sources, best, strict=True)},
    )
    nearest = dict(zip(sources, weights[values.argmin()].round(3).tolist(), strict=True))
    print(f"best that was tried: {values.min():.4f} at {nearest}")
    return 0


if __name__ == "__main__":
    errors.run(main)
