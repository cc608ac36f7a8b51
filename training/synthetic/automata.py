# SPDX-License-Identifier: Apache-2.0
"""RegBench: a language for each sequence, drawn as a probabilistic finite automaton (arXiv 2401.12973).

A sequence holds strings of one automaton, so that a model can learn an automaton that is new to it from the strings
read so far. Everything is drawn from (seed, split, number) alone: automaton 7 is the same among 100 and among 1,000.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import Dataset, DatasetDict, Features, List, Value
from huggingface_hub import DatasetCardData
from pydantic import PositiveInt, model_validator
from scipy.optimize import minimize_scalar
from transformers import PreTrainedConfig, PreTrainedModel
from typing_extensions import Self

from training.card import render
from training.figures import new_figure, save_figure
from training.files import checksum, make_once
from training.progress import progress
from training.recipe import Section


# RegBench's vocabulary: 18 symbols, a separator and padding.
NUM_SYMBOLS = 18
SEPARATOR, PADDING = NUM_SYMBOLS, NUM_SYMBOLS + 1
VOCAB_SIZE = NUM_SYMBOLS + 2
IGNORED = -100  # by torch's cross entropy
# Numbers of the random streams. `test_iid` has new strings of the training automata.
TRAIN, VALIDATION, TEST, TEST_IID = range(4)
SPLITS = {"train": TRAIN, "validation": VALIDATION, "test": TEST, "test_iid": TEST_IID}
# A training keeps the model of the best evaluation by each of these measures.
CHOSEN_BY = ("accuracy", "loss")
# Of the data set: its first automaton.
PICTURE = "automaton.png"
FEATURES = Features(
    {
        "automaton": Value("int64"),
        "input_ids": List(Value("int64")),
        "states": List(Value("int64")),
        "transitions": List(List(Value("int64"))),
    }
)


class AutomataSection(Section):
    """Sizes of automata and sequences, as ranges with both ends included; the defaults are RegBench's.

    Training has `num_automata` automata with one sequence each. Validation and test share `num_test` other automata,
    half each, with one sequence each.
    """

    language: Literal["automata"]
    num_automata: PositiveInt = 100
    num_test: int = 500
    num_states: tuple[int, int] = (4, 12)
    num_symbols: tuple[int, int] = (4, NUM_SYMBOLS)
    num_edges: tuple[int, int] = (1, 3)  # RegBench's option says 4, but its draw leaves out the upper end
    num_strings: tuple[int, int] = (10, 19)
    string_length: tuple[int, int] = (1, 49)
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _read_ranges(cls, values: Any) -> dict[str, Any]:
        # YAML has lists only.
        return {k: tuple(v) if isinstance(v, list) else v for k, v in dict(values).items()}

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        for name in ("num_states", "num_symbols", "num_edges", "num_strings", "string_length"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"`{name}` is [{low}, {high}]: give a range from 1 on, the smaller number first")
        most = self.num_edges[1]
        if most >= self.num_states[0]:
            raise ValueError(
                f"{most} edges need as many other states, but `num_states` begins at {self.num_states[0]}"
            )
        if most > self.num_symbols[0] or self.num_symbols[1] > NUM_SYMBOLS:
            raise ValueError(f"`num_symbols` is {list(self.num_symbols)}: it must lie within [{most}, {NUM_SYMBOLS}]")
        if self.num_test < 2 or self.num_test % 2:
            raise ValueError(f"`num_test` is {self.num_test}: give an even number, half of it is for validation")
        return self


class Automaton(NamedTuple):
    """An automaton that starts in state 0, may stop anywhere, and takes each allowed symbol with equal probability.

    `transitions` `(states, symbols)` is the state that a symbol leads to, or -1 where a state does not allow it.
    """

    transitions: np.ndarray

    def draw_string(self, rng: np.random.Generator, length: int) -> tuple[list[int], list[int]]:
        """Return a string of `length` symbols, and the state after each."""
        edges = [[(s, t) for s, t in enumerate(row) if t >= 0] for row in self.transitions.tolist()]
        symbols, states, state = [], [], 0
        for draw in rng.random(length).tolist():
            symbol, state = edges[state][int(draw * len(edges[state]))]
            symbols.append(symbol)
            states.append(state)
        return symbols, states


def _renumber(transitions: np.ndarray, kept: Iterable[int], numbers: dict[int, int]) -> np.ndarray:
    """Return the rows of the kept states, with the targets by their new numbers."""
    return np.array([[numbers[target] if target >= 0 else -1 for target in transitions[state]] for state in kept])


def trim(transitions: np.ndarray) -> np.ndarray:
    """Keep the states that can be reached from state 0, in the order of a breadth-first search."""
    reached = [0]
    # The list grows while it is read: it is the queue of the search.
    for state in reached:
        reached += [target for target in transitions[state] if target >= 0 and target not in reached]
    return _renumber(transitions, reached, {state: number for number, state in enumerate(reached)})


def minimize(transitions: np.ndarray) -> np.ndarray:
    """Merge states from which the same strings follow (Moore's partition refinement); state 0 stays first."""
    # All states accept, so that they are alike until their symbols tell them apart.
    group = np.zeros(len(transitions), dtype=int)
    while True:
        # Where there is no edge, -1 reads a wrong group, which `where` replaces.
        led_to = np.where(transitions >= 0, group[transitions], -1)
        _, first, refined = np.unique(np.column_stack([group, led_to]), axis=0, return_index=True, return_inverse=True)
        # `reshape`, because numpy 2.0 returns the inverse as a column.
        refined = np.argsort(np.argsort(first))[refined.reshape(-1)]  # numbered by their first states
        if refined.max() == group.max():
            return _renumber(transitions, np.sort(first), dict(enumerate(refined)))
        group = refined


def draw_automaton(section: AutomataSection, rng: np.random.Generator) -> Automaton:
    """Return a random automaton, trimmed and minimal (which changes no probability of a string)."""
    num_states = rng.integers(*section.num_states, endpoint=True)
    alphabet = rng.choice(NUM_SYMBOLS, rng.integers(*section.num_symbols, endpoint=True), replace=False)
    transitions = np.full((num_states, NUM_SYMBOLS), -1)
    for state in range(num_states):
        num_edges = rng.integers(*section.num_edges, endpoint=True)
        # As in RegBench: no edge leads back to its state, and no two edges to one state.
        others = np.delete(np.arange(num_states), state)
        symbols = rng.choice(alphabet, num_edges, replace=False)
        transitions[state, symbols] = rng.choice(others, num_edges, replace=False)
    return Automaton(minimize(trim(transitions)))


def draw_sequence(section: AutomataSection, automaton: Automaton, rng: np.random.Generator) -> dict[str, Any]:
    """Return strings of one automaton, with a separator between two; the state after a separator is the first."""
    tokens: list[int] = []
    states: list[int] = []
    for number in range(rng.integers(*section.num_strings, endpoint=True)):
        if number:
            tokens.append(SEPARATOR)
            states.append(0)
        symbols, after = automaton.draw_string(rng, int(rng.integers(*section.string_length, endpoint=True)))
        tokens += symbols
        states += after
    return {"input_ids": tokens, "states": states, "transitions": automaton.transitions.tolist()}


def draw_split(section: AutomataSection, split: int) -> Dataset:
    """Return the sequences of one split, with the automaton of each and its state after each token."""
    is_iid = split == TEST_IID
    count = section.num_automata if split == TRAIN else section.num_test // 2
    rows = []
    for index in progress(range(count), "automata", "sequence"):
        # The test may have more sequences than there are training automata: it goes through them again.
        number = index % section.num_automata if is_iid else index
        rng = np.random.default_rng([section.seed, TRAIN if is_iid else split, number])
        automaton = draw_automaton(section, rng)
        if is_iid:
            # The automaton came from its training stream. Its strings must not.
            rng = np.random.default_rng([section.seed, TEST_IID, index])
        rows.append({"automaton": number, **draw_sequence(section, automaton, rng)})
    return Dataset.from_list(rows, features=FEATURES)


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return a batch that is padded on the right, which needs no mask: a causal model does not read what comes later.

    Labels equal the ids, for transformers shifts them itself. Separators and padding have no label.
    """
    length = max(len(row["input_ids"]) for row in rows)
    input_ids = torch.full((len(rows), length), PADDING)
    for row, ids in zip(input_ids, (row["input_ids"] for row in rows), strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return {"input_ids": input_ids, "labels": input_ids.masked_fill(input_ids >= NUM_SYMBOLS, IGNORED)}


def tokenizer_of(section: AutomataSection) -> None:
    """Return nothing: the tokens stand for no text."""


def collator(section: AutomataSection, config: PreTrainedConfig) -> Callable[..., dict[str, torch.Tensor]]:
    """Return what makes batches, for any model."""
    return collate


def next_symbol_probabilities(rows: list[dict[str, Any]], length: int) -> torch.Tensor:
    """Return the automata's probabilities of the next token at each position of a padded batch, `(B, length, V)`.

    They are all zero where no symbol comes next: before a separator, at the end and at padding.
    """
    probabilities = torch.zeros(len(rows), length, VOCAB_SIZE, dtype=torch.float64)
    for row, batch_row in zip(rows, probabilities, strict=True):
        ids = torch.tensor(row["input_ids"])
        # The state after a token decides which symbols may be next, each with equal probability.
        allowed = (torch.tensor(row["transitions"]) >= 0).double()[torch.tensor(row["states"])]  # (T, symbols)
        is_next_symbol = torch.cat([ids[1:] < NUM_SYMBOLS, torch.tensor([False])])
        batch_row[: len(ids), :NUM_SYMBOLS] = allowed / allowed.sum(-1, keepdim=True) * is_next_symbol[:, None]
    return probabilities


class Predictions(NamedTuple):
    """The predictions of a model at the P places of a split where a symbol comes next.

    `logits` `(P, V)`; `true` `(P, V)`, the automata's probabilities; `next_tokens` `(P,)`; `rows` `(P,)`, the numbers
    of the places' sequences in the split. The places of a sequence stand together, in their order.
    """

    logits: torch.Tensor
    true: torch.Tensor
    next_tokens: torch.Tensor
    rows: torch.Tensor

    @property
    def is_last(self) -> torch.Tensor:
        """Mask `(P,)` of the last place of each sequence."""
        return torch.cat([self.rows[1:] != self.rows[:-1], torch.tensor([True])])


@torch.no_grad()
def _predict_batch(model: PreTrainedModel, rows: list[dict[str, Any]], numbers: np.ndarray) -> Predictions:
    ids = collate(rows)["input_ids"]
    logits = model(input_ids=ids.to(model.device), use_cache=False).logits[..., :VOCAB_SIZE].double().cpu()
    true = next_symbol_probabilities(rows, ids.shape[1])  # (B, T, V)
    is_next_symbol = true.sum(-1) > 0
    next_tokens = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=PADDING)
    row_numbers = torch.from_numpy(numbers)[:, None].expand_as(ids)
    return Predictions(*(part[is_next_symbol] for part in (logits, true, next_tokens, row_numbers)))


def predict(model: PreTrainedModel, split: Dataset, batch_size: int) -> Predictions:
    """Return what a model predicts on a split; `batch_size` changes the speed alone."""
    order = np.argsort([len(ids) for ids in split["input_ids"]])  # batches of similar lengths have little padding
    rows = split.select(order).to_list()
    starts = range(0, len(rows), batch_size)
    batches = [_predict_batch(model, rows[i : i + batch_size], order[i : i + batch_size]) for i in starts]
    return Predictions(*map(torch.cat, zip(*batches, strict=True)))


def _scores_by_place(predictions: Predictions, temperature: float) -> torch.Tensor:
    """Return accuracy, distance and loss at each place, `(P, 3)`, of logits divided by a temperature."""
    log_predicted = (predictions.logits / temperature).log_softmax(-1)
    # Several symbols may come next, and each of them is right.
    is_right = predictions.true.gather(-1, log_predicted.argmax(-1, keepdim=True))[..., 0] > 0
    distance = (log_predicted.exp() - predictions.true).abs().sum(-1) / 2
    loss = -log_predicted.gather(-1, predictions.next_tokens[:, None])[..., 0]
    return torch.stack([is_right.double(), distance, loss], dim=-1)


def measures(predictions: Predictions, temperature: float = 1.0) -> dict[str, float]:
    """Measure predictions where a symbol comes next, and at the last such place of each sequence.

    Args:
        predictions: of a model on a split.
        temperature: the logits are divided by it.

    Returns:
        `accuracy`: share of positions at which the most probable token may come next. `tvd`: total variation distance
        (half of the summed absolute differences) to the automaton's probabilities. `last_accuracy`, `last_tvd`: the
        same at last positions alone. `loss`: nats per symbol. `num_positions`: the number of positions.
    """
    by_place = _scores_by_place(predictions, temperature)
    accuracy, tvd, loss = by_place.mean(0).tolist()
    last_accuracy, last_tvd, _ = by_place[predictions.is_last].mean(0).tolist()
    return {
        "accuracy": accuracy,
        "tvd": tvd,
        "last_accuracy": last_accuracy,
        "last_tvd": last_tvd,
        "loss": loss,
        "num_positions": len(by_place),
    }


def score(model: PreTrainedModel, split: Dataset, batch_size: int) -> dict[str, float]:
    """Return the `measures` of a model on a split, its logits as they are."""
    return measures(predict(model, split, batch_size))


def fitted_temperature(predictions: Predictions) -> float:
    """Return the divisor of the logits, from 1/100 to 100, that makes the symbols of a split the most likely.

    The symbols decide, not the automata's probabilities: a temperature can be fitted so on any text.
    """

    def loss(log_temperature: float) -> float:
        return float(_scores_by_place(predictions, math.exp(log_temperature))[:, 2].mean())

    # The loss is convex in 1 / temperature, so that there is one minimum only.
    bounds = (-math.log(100), math.log(100))
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x)


def _means(surest: Predictions, likeliest: Predictions, temperature: float) -> dict[str, float]:
    plain, fitted = measures(likeliest), measures(likeliest, temperature)
    distances = ("tvd", "last_tvd", "loss")
    means = measures(surest) | {name: plain[name] for name in distances}
    return means | {f"fitted_{name}": fitted[name] for name in distances}


def _means_by_sequence(surest: Predictions, likeliest: Predictions, temperature: float) -> dict[str, list[float]]:
    counts = torch.bincount(surest.rows)

    def means(predictions: Predictions, temperature: float, measure: int) -> list[float]:
        sums = torch.bincount(predictions.rows, _scores_by_place(predictions, temperature)[:, measure])
        return [round(mean, 4) for mean in (sums / counts).tolist()]

    return {
        "num_positions": counts.tolist(),
        "accuracy": means(surest, 1.0, 0),
        "tvd": means(likeliest, 1.0, 1),
        "fitted_tvd": means(likeliest, temperature, 1),
    }


def report(models: dict[str, PreTrainedModel], splits: DatasetDict, batch_size: int) -> dict[str, Any]:
    """Return what the result of a training says of its models.

    Accuracy is that of the model with the best accuracy on validation automata; distance and loss are those of the
    model with the least loss there. Their fitted twins have logits divided by one temperature, which is fitted on
    validation automata (see `fitted_temperature`) and would change no accuracy.

    Args:
        models: the model of the best evaluation by each measure of `CHOSEN_BY`.
        splits: of the language.
        batch_size: sequences per forward pass.

    Returns:
        `metrics`: `temperature`, and for each split the means that `measures` names, with `fitted_tvd`,
        `fitted_last_tvd` and `fitted_loss`. `test_sequences`: a list each of `num_positions`, `accuracy`, `tvd` and
        `fitted_tvd` of the test sequences.
    """
    predictions = {
        name: (predict(models["accuracy"], split, batch_size), predict(models["loss"], split, batch_size))
        for name, split in splits.items()
        if name != "train"
    }
    temperature = fitted_temperature(predictions["validation"][1])
    means = {name: _means(*pair, temperature) for name, pair in predictions.items()}
    return {
        "metrics": {"temperature": temperature, **means},
        "test_sequences": _means_by_sequence(*predictions["test"], temperature),
    }


def data_folder(section: AutomataSection) -> Path:
    """Return the folder of the sequences, named by their settings: `runs/automata-HASH`."""
    settings = json.dumps(section.model_dump(), sort_keys=True)
    return Path(f"runs/automata-{hashlib.sha256(settings.encode()).hexdigest()[:12]}")


def _card(section: AutomataSection, splits: DatasetDict, checksums: dict[str, str]) -> str:
    about = {
        "train": "one sequence each",
        "validation": "others, one sequence each",
        "test": "others again, one sequence each",
        "test_iid": "those of `train`, new sequences",
    }
    rows = [
        {"name": name, "sequences": len(split), "tokens": sum(map(len, split["input_ids"])), "about": about[name]}
        for name, split in splits.items()
    ]
    files = [{"split": name, "path": f"{name}.parquet"} for name in splits]
    metadata = DatasetCardData(
        license="apache-2.0",
        task_categories=["text-generation"],
        tags=["in-context-learning", "regular-languages", "synthetic"],
        pretty_name=f"RegBench, {section.num_automata:,} automata",
        configs=[{"config_name": "default", "data_files": files}],
    )
    return render(
        "automata_card.md.jinja",
        metadata=metadata.to_yaml(),
        section=section,
        splits=rows,
        checksums=checksums,
        picture=PICTURE,
        num_symbols=NUM_SYMBOLS,
        separator=SEPARATOR,
        padding=PADDING,
    )


def _draw_automaton(transitions: list[list[int]], path: Path) -> None:
    """Draw an automaton as a PNG: a row for each state, with the state that follows each symbol."""
    figure, ((axis,),) = new_figure(1, 1, height=0.7 + 0.27 * len(transitions))
    table = np.array(transitions)
    axis.imshow(table >= 0, cmap="Blues", vmin=0, vmax=4, aspect="auto")
    for state, symbol in zip(*(table >= 0).nonzero(), strict=True):
        axis.text(symbol, state, str(table[state, symbol]), fontsize=10, ha="center", va="center")
    axis.grid(False)
    axis.set(xlabel="symbol", ylabel="state", xticks=range(NUM_SYMBOLS), yticks=range(len(table)))
    note = "Each number is the state that follows; a symbol without one may not come in that state."
    save_figure(figure, path, "The first automaton", note)


def save_splits(section: AutomataSection, splits: DatasetDict, folder: Path) -> None:
    """Fill a folder with a data set in the form of the Hub: Parquet files, a picture, and its card."""
    for name, split in splits.items():
        split.to_parquet(folder / f"{name}.parquet")
    _draw_automaton(splits["train"][0]["transitions"], folder / PICTURE)
    files = {f"{name}.parquet": checksum(folder / f"{name}.parquet") for name in splits}
    (folder / "README.md").write_text(_card(section, splits, files), encoding="utf-8")


def _draw_once(section: AutomataSection) -> Path:
    """Return the folder of the sequences, which are drawn if they are not there yet."""
    folder = data_folder(section)

    def draw(staged: Path) -> None:
        splits = DatasetDict({name: draw_split(section, number) for name, number in SPLITS.items()})
        save_splits(section, splits, staged)

    make_once(folder, draw)
    return folder


def draw_splits(section: AutomataSection) -> DatasetDict:
    """Return the sequences for training, validation and the two tests (new automata; new sequences of seen automata).

    They are drawn once, into `data_folder`, where `datasets.load_dataset` reads them too.
    """
    folder = _draw_once(section)
    return DatasetDict({name: Dataset(pq.read_table(folder / f"{name}.parquet")) for name in SPLITS})


def provenance(section: AutomataSection) -> dict[str, Any]:
    """Return the checksums of what a training reads, for its result; draws it if it is not there yet."""
    folder = _draw_once(section)
    return {name: {"sha256": checksum(folder / f"{name}.parquet")} for name in SPLITS}
