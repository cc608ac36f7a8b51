# SPDX-License-Identifier: Apache-2.0
"""Made-up numbers in the form in which each experiment leaves its own: what its pictures are drawn from."""

import itertools
import math
import random

from training.experiments import bound, bound_recall, memory_cost, reading, regbench, searching, streaming
from training.experiments.memory_questions import QUESTIONS


_RNG = random.Random("made up")


def _seeds(recipe, middle=0.5, spread=0.05):
    return [middle + _RNG.uniform(-spread, spread) for _ in recipe.seeds]


def _fall(number, of=1):
    """Return a value that falls with the number."""
    return 2 + 2 * math.exp(-3 * number / of) + _RNG.uniform(0, 0.2)


def _bound(recipe):
    losses = [
        {"label": label, "way": way, "budget": budget, "seeds": _seeds(recipe, _fall(budget, 512))}
        for label in recipe.runs
        for way, budget in [(bound.ALL, 0), *itertools.product(recipe.ways(label), recipe.budgets)]
    ]
    return {"losses": dict.fromkeys(recipe.texts, losses)}


def _bound_recall(recipe):
    return {
        "settings": [
            {**dict(zip(bound_recall.PLACE, one, strict=True)), "accuracy": _seeds(recipe)} for one in recipe.settings
        ]
    }


def _streaming(recipe):
    size = recipe.num_tokens // recipe.stretch
    return {
        "streams": [
            {
                "label": label,
                "way": way,
                "losses": [[_fall(place, size) for place in range(size)] for _ in recipe.seeds],
            }
            for label in recipe.runs
            for way in [streaming.PIECES, *recipe.ways(label)]
        ]
    }


def _reading(recipe):
    ways = [f"{number:,} tokens {how}" for number in recipe.num_tokens for how in (reading.IN_SEQUENCE, reading.ALONE)]
    return {
        "losses": [
            {"label": label, "way": way, "losses": _seeds(recipe, 3)}
            for label in recipe.runs
            for way in [reading.NOTHING, *ways, *([reading.LORA] if label in recipe.adapted else [])]
        ]
    }


def _searching(recipe):
    return {
        "shares": [
            {
                "label": label,
                "index": index,
                "share": share,
                "seeds": [{searching.ERRORS[0]: one / share} for one in _seeds(recipe, 1e-3, 5e-4)],
            }
            for label in recipe.runs
            for index in searching.SHARE_INDEXES
            for share in recipe.shares
        ]
    }


def _join(recipe):
    def seed(label):
        accuracy = {str(number): 0.5 + 0.5 * _RNG.random() / number for number in recipe.num_documents}
        return {"readings": {way: {"accuracy": accuracy} for way in recipe.readings(label)}}

    return {"models": {label: [seed(label) for _ in recipe.seeds] for label in recipe.runs}}


def _needles(recipe):
    def seed():
        return {"exact_by_distance": {str(number): [_RNG.random() for _ in range(8)] for number in recipe.num_needles}}

    return {"series": [{"label": label, "seeds": [seed() for _ in recipe.seeds]} for label in recipe.runs]}


def _suite(recipe):
    return {
        "accuracies": [
            {"place": place.name, "label": label, "accuracy": _seeds(recipe)}
            for place in recipe.places
            for label in recipe.runs
        ]
    }


def _position_loss(recipe):
    positions = [(place + 0.5) * recipe.bin_width for place in range(recipe.context_length // recipe.bin_width)]

    def bands():
        mean = [_fall(place, recipe.context_length) for place in positions]
        return {"mean": mean, "low": [value - 0.1 for value in mean], "high": [value + 0.1 for value in mean]}

    first = recipe.labels[0]
    models = [
        {"label": label, "depth": depth, "loss": bands(), "minus_first": None if label == first else bands()}
        for depth in recipe.depths
        for label in recipe.labels
    ]
    return {text: {"positions": positions, "models": models} for text in recipe.texts}


def _training_curves(recipe):
    trainings = [(one.label, one.depth, one.seed, one.recipe.training.learning_rate) for one in recipe.trainings]
    points = [200_000 * number for number in range(1, 13)]
    return {
        "runs": [
            {"label": label, "depth": depth, "seed": seed, "learning_rate": rate, "validation_loss": _fall(1)}
            for label, depth, seed, rate in trainings
        ],
        "curves": [
            {
                "label": label,
                "depth": depth,
                "seed": seed,
                "validation": [{"tokens": point, "loss": _fall(point, 2_400_000)} for point in points],
            }
            for label, depth, seed, _ in trainings
        ],
    }


def _attention_maps(recipe):
    heads = range(4)
    place = itertools.product(recipe.lengths, recipe.seeds, range(recipe.heads_depth), heads)
    return {
        "maps": [
            {"label": label, "length": length, "bins": [[_RNG.random() / length] * (length // 8) for _ in heads]}
            for label in recipe.runs
            for length in recipe.lengths
            if (label, length) != ("GPT-2", recipe.lengths[-1])
        ],
        "deep_heads": [
            {"length": length, "layer": layer, "leak_coefficient": _RNG.random(), "peak_width": _RNG.randint(0, 99)}
            for length, _, layer, _ in place
        ],
    }


def _regbench(recipe):
    def seed():
        return {split: {name: _RNG.random() for name in regbench.MEASURES} for split in ("test", "test_iid")}

    return {
        "series": [
            {"label": label, "num_automata": number, "seeds": [seed() for _ in recipe.seeds]}
            for number in recipe.num_automata
            for label in recipe.runs
        ]
    }


def _induction(recipe):
    curve = [(100 * step, 1 / _fall(step, 30)) for step in range(1, 31)]
    return {"validation_accuracy": {label: [curve] for label in recipe.runs}, "informed_reader": {"accuracy": 0.97}}


def _memory_models(recipe):
    measure = f"eval_{QUESTIONS[recipe.question].curve.measure}"
    places = {"autoencoding_by_place": [_RNG.random() for _ in range(16)]}
    curve = [{"step": 100 * step, measure: 1 / _fall(step, 9)} for step in range(1, 10)]
    stages = [
        {"name": name, "steps": 900, "training_flops": 3e12, "metrics": places, "learning_curve": curve}
        for name in ("combined", "probe")
    ]
    series = [
        {"label": label, "training_flops": [3e12, 3e12], "seeds": [{"stages": stages} for _ in recipe.seeds]}
        for label in recipe.runs
    ]
    return {"unigram": {"accuracy": 0.19}, "series": series}


def _memory_cost(recipe):
    """Memory models read in time that grows slowly with the length, full context in one that grows fast."""

    def seed(label):
        power = 1.4 if label.startswith("Full") else 0.6
        growing = {str(length): (length / 512) ** power * _RNG.uniform(0.9, 1.1) for length in recipe.lengths}
        falling = {str(length): _fall(length, recipe.lengths[-1]) for length in recipe.lengths}
        return {"measured": {memory_cost.LOSS: falling, **dict.fromkeys(memory_cost.CROSSING, growing)}}

    return {"series": [{"label": label, "seeds": [seed(label) for _ in recipe.seeds]} for label in recipe.runs]}


def _search(recipe):
    trials = []
    for number in range(12):
        settings = {
            key: _RNG.choice(values) if isinstance(values, list) else _RNG.uniform(values.low, values.high)
            for key, values in recipe.space.items()
        }
        trials.append({"number": number, "settings": settings, "metric": _RNG.random(), "recipe_hash": str(number)})
    return {"trials": trials}


_MAKERS = {
    "attention_maps": _attention_maps,
    "bound": _bound,
    "bound_recall": _bound_recall,
    "induction": _induction,
    "join": _join,
    "memory_cost": _memory_cost,
    "memory_models": _memory_models,
    "needles": _needles,
    "position_loss": _position_loss,
    "reading": _reading,
    "regbench": _regbench,
    "search": _search,
    "searching": _searching,
    "streaming": _streaming,
    "suite": _suite,
    "training_curves": _training_curves,
}
# Tasks whose pictures have made-up numbers here; three moons have a committed result of their own.
TASKS = sorted(_MAKERS)


def made_up(recipe):
    """Return the `measured` of a result of a recipe."""
    return _MAKERS[recipe.task](recipe)
