# SPDX-License-Identifier: Apache-2.0
"""RegBench: a language for each sequence, drawn as a probabilistic finite automaton (arXiv 2401.12973).

A sequence holds strings of one automaton, so that a model can learn an automaton that is new to it from the strings
read so far. Everything is drawn from (seed, split, number) alone: automaton 7 is the same among 100 and among 1,000.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import Dataset, DatasetDict, Features, List, Value
from huggingface_hub import DatasetCardData
from pydantic import PositiveInt, model_validator
from transformers import PreTrainedModel
from typing_extensions import Self

from training.card import render
from training.files import checksum, make_once
from training.recipe import Section


# RegBench's vocabulary: 18 symbols, a separator and padding.
NUM_SYMBOLS = 18
SEPARATOR, PADDING = NUM_SYMBOLS, NUM_SYMBOLS + 1
VOCAB_SIZE = NUM_SYMBOLS + 2
IGNORED = -100  # by torch's cross entropy
# Numbers of the random streams. `test_iid` has new strings of the training automata.
TRAIN, VALIDATION, TEST, TEST_IID = range(4)
SPLITS = {"train": TRAIN, "validation": VALIDATION, "test": TEST, "test_iid": TEST_IID}
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
    for index in range(count):
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


@torch.no_grad()
def _score_batch(model: PreTrainedModel, rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return accuracy, distance and loss where a symbol comes next `(positions, 3)`, and at each last one `(B, 3)`."""
    ids = collate(rows)["input_ids"]
    logits = model(input_ids=ids.to(model.device), use_cache=False).logits[..., :VOCAB_SIZE]
    log_predicted = logits.double().log_softmax(-1).cpu()
    true = next_symbol_probabilities(rows, ids.shape[1])  # (B, T, V)
    # Several symbols may come next, and each of them is right.
    is_right = true.gather(-1, log_predicted.argmax(-1, keepdim=True))[..., 0] > 0
    distance = (log_predicted.exp() - true).abs().sum(-1) / 2
    loss = -log_predicted[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]  # (B, T - 1)
    scores = torch.stack([is_right.double(), distance, torch.nn.functional.pad(loss, (0, 1))], dim=-1)
    is_next_symbol = true.sum(-1) > 0
    positions = torch.arange(ids.shape[1]).expand_as(is_next_symbol)
    last = torch.where(is_next_symbol, positions, -1).max(dim=1).values
    return scores[is_next_symbol], scores[torch.arange(len(rows)), last]


def score(model: PreTrainedModel, split: Dataset, batch_size: int) -> dict[str, float]:
    """Measure how a model predicts the automata, where a symbol comes next and at the last such place of a sequence.

    Returns:
        `accuracy`: share of positions at which the most probable token may come next. `tvd`: total variation distance
        (half of the summed absolute differences) to the automaton's probabilities. `last_accuracy`, `last_tvd`: the
        same at last positions alone. `loss`: nats per symbol. `num_positions`: the number of positions.
    """
    order = np.argsort([len(ids) for ids in split["input_ids"]])  # batches of similar lengths have little padding
    rows = split.select(order).to_list()
    batches = [_score_batch(model, rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    position = torch.cat([positions for positions, _ in batches])
    last = torch.cat([lasts for _, lasts in batches])
    accuracy, tvd, loss = position.mean(0).tolist()
    last_accuracy, last_tvd, _ = last.mean(0).tolist()
    return {
        "accuracy": accuracy,
        "tvd": tvd,
        "last_accuracy": last_accuracy,
        "last_tvd": last_tvd,
        "loss": loss,
        "num_positions": len(position),
    }


def data_folder(section: AutomataSection) -> Path:
    """Return the folder of the sequences, named by their settings: `runs/automata-HASH`."""
    settings = json.dumps(section.model_dump(), sort_keys=True)
    return Path(f"runs/automata-{hashlib.sha256(settings.encode()).hexdigest()[:12]}")


def _card(section: AutomataSection, splits: DatasetDict) -> str:
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
        num_symbols=NUM_SYMBOLS,
        separator=SEPARATOR,
        padding=PADDING,
    )


def save_splits(section: AutomataSection, splits: DatasetDict, folder: Path) -> None:
    """Fill a folder with a data set in the form of the Hub: a Parquet file for each split, and its card."""
    for name, split in splits.items():
        split.to_parquet(folder / f"{name}.parquet")
    (folder / "README.md").write_text(_card(section, splits), encoding="utf-8")


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
