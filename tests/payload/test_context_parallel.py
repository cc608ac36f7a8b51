# SPDX-License-Identifier: Apache-2.0
"""Processes that share each text compute what one process does that reads it alone (`context_parallel`).

Trainings of that kind are started from the command line in `test_cli.py`, and joined with sharding in
`test_distributed.py`.
"""

import pytest
import torch
from helpers.kinds import for_kinds
from helpers.processes import run_on_processes

from modeling_memory_mosaic import context_parallel, leaky_average
from modeling_memory_mosaic.layout_memory_mosaic import Stretch, StretchStates, cuts_of_text


pytestmark = pytest.mark.slow  # processes are started

# Texts whose tokens no number of processes shares evenly, one of them longer than a chunk of leaky sums.
SCRIPT = """
import sys
import pytest
import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, sys.argv[1])
from helpers.kinds import KINDS
from helpers.models import checkpoint_activations
from modeling_memory_mosaic import context_parallel
from modeling_memory_mosaic.layout_memory_mosaic import cuts_of_text

torch.distributed.init_process_group("gloo")
rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
CASES = {"plain": (37, 0, 0), "padded": (37, 1, 0), "packed": (37, 0, 1), "packed and padded": (131, 1, 1)}


def batch(length, is_padded, is_packed):
    ids = KINDS["mosaic"].inputs(KINDS["mosaic"].make(), 3, length)["input_ids"]
    inputs, third = {"input_ids": ids, "labels": ids.clone()}, length // 3
    if is_padded:  # on the left over whole stretches, on the right, and within
        mask = torch.ones_like(ids)
        mask[0, : length // 2 + 1] = mask[1, :1] = mask[1, third:] = mask[2, third : 2 * third] = 0
        inputs |= {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    if is_packed:  # documents of one token, that end with a stretch, and that are longer than one
        inputs["position_ids"] = torch.arange(length).repeat(3, 1)
        cuts = cuts_of_text(length, size)
        for row, begins in enumerate(([third], [1, 2, length - 1], [cuts[1], cuts[1] + 1, cuts[-2]])):
            for begin in begins:
                inputs["position_ids"][row, begin:] = torch.arange(length - begin)
    return inputs


def gradients(model):
    # The mean over processes, as DDP and FSDP2 take it.
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    for gradient in found.values():
        torch.distributed.all_reduce(gradient)
        gradient /= size
    return found


def own(tensor):
    cuts = cuts_of_text(tensor.shape[1], size)
    return tensor[:, cuts[rank] : cuts[rank + 1]]


def assert_as_exact(answer, expected, exact, what):
    # Numbers in float32 are rounded: those of several processes no more than those of one, beyond 1e-6.
    errors = [((each.double() - exact).norm() / exact.norm()).item() for each in (answer, expected)]
    assert errors[0] <= max(2 * errors[1], 1e-6), f"{what}: {errors}"


def read(model, inputs, **options):
    with context_parallel(model):
        outputs = model(**inputs, use_cache=False, **options)
    outputs.loss.backward()
    return outputs


def of_one_process(kind, inputs, dtype, **options):
    model = kind.make(dtype=dtype)
    outputs = model(**inputs, use_cache=False, **options)
    outputs.loss.backward()
    return outputs, {name: parameter.grad for name, parameter in model.named_parameters()}


def joined(parts):
    return torch.cat([part.flatten().double() for part in parts.values()])


def check(kind, case):
    inputs, what = batch(*CASES[case]), f"{kind}, {case}"
    is_token = own(inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))) == 1
    exact, gradient = of_one_process(kind, inputs, torch.float64)
    for dtype in (torch.float64, torch.float32):
        model = kind.make(dtype=dtype)
        outputs = read(model, inputs)
        found, logits = gradients(model), outputs.logits.detach()[is_token]
        assert outputs.logits.shape == own(exact.logits).shape
        torch.testing.assert_close(outputs.loss, exact.loss, rtol=1e-6, atol=0)  # computed in float32
        if dtype == torch.float64:
            torch.testing.assert_close(logits, own(exact.logits)[is_token], rtol=0, atol=1e-10, msg=what)
            for name, expected in gradient.items():
                torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-10, msg=f"{what}: {name}")
            continue
        rounded, of_rounded = of_one_process(kind, inputs, dtype)
        if is_token.any():
            parts = (own(each.logits.detach())[is_token] for each in (rounded, exact))
            assert_as_exact(logits, *parts, f"{what}: logits")
        assert_as_exact(*(joined(each) for each in (found, of_rounded, gradient)), f"{what}: gradient")


def check_ways(kind):
    inputs = batch(*CASES["packed and padded"])
    expected = of_one_process(kind, inputs, torch.float64)[1]
    for way in ("DDP", "reentrant", "not reentrant", "without logits", "embeddings", "accumulated"):
        model, options, given, parts = kind.make(dtype=torch.float64), {}, dict(inputs), 1
        reader = DistributedDataParallel(model) if way == "DDP" else model
        if "reentrant" in way:
            checkpoint_activations(model.train(), way == "reentrant")
        if way == "embeddings":
            with torch.no_grad():
                given["inputs_embeds"] = model.get_input_embeddings()(given.pop("input_ids"))
        if way == "accumulated":
            options["num_items_in_batch"], parts = 2 * (inputs["labels"][:, 1:] != -100).sum(), 2
        whole = expected
        if way == "without logits":
            if not hasattr(torch.nn.functional, "linear_cross_entropy"):
                continue
            options["skip_logits"] = True  # the loss in float64, and not in float32
            whole = of_one_process(kind, inputs, torch.float64, skip_logits=True)[1]
        for _ in range(parts):
            read(reader, given, **options)
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        found = found if way == "DDP" else gradients(model)
        for name, gradient in whole.items():
            if way != "embeddings" or "embed_tokens" not in name:
                torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-10, msg=f"{way}, {name}")


def check_states(kind):
    model, inputs = kind.make(dtype=torch.float64), batch(*CASES["packed and padded"])
    inputs.pop("labels")
    expected = model.model(**inputs, use_cache=False, output_hidden_states=True)
    with torch.no_grad(), context_parallel(model.model):
        outputs = model.model(**inputs, output_hidden_states=True)
    is_token = own(inputs["attention_mask"]) == 1
    for state, whole in zip(outputs.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(state[is_token], own(whole)[is_token], rtol=0, atol=1e-10)
    assert outputs[1:] == (outputs.hidden_states,)  # and no memory


def check_delays(kind):
    # Each process would draw its own delay, were they not those of the first one.
    torch.manual_seed(rank)
    ids = batch(*CASES["plain"])["input_ids"]
    for draw in ("step", "sequence"):
        options = {"long_term_delay_range": (2, 12), "long_term_delay_draw": draw}
        model = kind.make(dtype=torch.float64, **options).train()
        torch.manual_seed(rank)
        with context_parallel(model):
            answer = model(input_ids=ids, use_cache=False).logits
        torch.manual_seed(0)
        torch.testing.assert_close(answer, own(model(input_ids=ids, use_cache=False).logits), rtol=0, atol=1e-10)


def check_refusals(kind):
    model, inputs = kind.make(), batch(*CASES["plain"])
    ids = inputs["input_ids"]
    eager = kind.make()
    eager.set_attn_implementation("eager")
    with context_parallel(model), context_parallel(eager):
        with pytest.raises(ValueError, match="not read behind a memory"):
            model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
        with pytest.raises(ValueError, match="leave logits_to_keep out"):
            model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0, use_cache=False)
        with pytest.raises(ValueError, match="not read behind a memory"):
            model.memorize(ids)
        with pytest.raises(ValueError, match="cannot share a text of 1 tokens"):
            model(input_ids=ids[:, :1])
        with pytest.raises(ValueError, match="were given different texts"):
            model(input_ids=ids + (torch.arange(3)[:, None] == rank))
        with pytest.raises(ValueError, match="were given different texts"):
            model(input_ids=ids[:, : 30 + rank])
        with pytest.raises(ValueError, match="each process needs those of whole texts"):
            model(input_ids=ids, labels=own(ids))
        with pytest.raises(ValueError, match='set_attn_implementation."sdpa"'):
            eager(input_ids=ids, output_attentions=True)
        compiled = torch.compile(model, backend="eager")(input_ids=ids).logits
        assert torch.equal(compiled, model(input_ids=ids).logits)  # by the same code
    assert torch.equal(model(input_ids=ids).logits, kind.make()(input_ids=ids).logits)  # outside, as ever


torch.set_num_threads(1)
for name in sys.argv[2:]:
    kind = KINDS[name]
    for case in CASES:
        check(kind, case)
    check_states(kind)
    print(f"<{name}: equal>", flush=True)
    check_ways(kind)
    if name == "mosaic v2":
        check_delays(kind)
    print(f"<{name}: ways>", flush=True)
    check_refusals(kind)
    print(f"<{name}: refused>", flush=True)
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def texts_that_processes_share(request, tmp_path_factory):
    script = tmp_path_factory.mktemp("context_parallel") / "script.py"
    script.write_text(SCRIPT)
    number, kinds = request.param
    return number, run_on_processes(number, script, request.config.rootpath / "tests", *kinds)


ON_TWO = (2, ("mosaic", "mosaic v2"))
ON_FOUR = (4, ("mosaic", "narrowing mosaic", "mosaic v2", "mosaic v2 otherwise"))
CHECKS = pytest.mark.parametrize("what", ["equal", "ways", "refused"])


@CHECKS
@for_kinds("mosaic", "mosaic v2")
@pytest.mark.parametrize("texts_that_processes_share", [ON_TWO], indirect=True, ids=["two"])
def test_processes_that_share_texts_equal_one(kind, what, texts_that_processes_share):
    """In logits, loss and gradient, with padding and packed documents, of texts that no number divides."""
    number, process = texts_that_processes_share
    assert process.stdout.count(f"<{kind}: {what}>") == number, process.stderr[-4000:]


@CHECKS
@for_kinds("mosaic", "narrowing mosaic", "mosaic v2", "mosaic v2 otherwise")
@pytest.mark.parametrize("texts_that_processes_share", [ON_FOUR], indirect=True, ids=["four"])
def test_four_processes_that_share_texts_equal_one(kind, what, texts_that_processes_share):
    number, process = texts_that_processes_share
    assert process.stdout.count(f"<{kind}: {what}>") == number, process.stderr[-4000:]


@for_kinds("memory model", "continuous", "classifier")
def test_models_that_need_whole_texts_are_refused(kind, monkeypatch):
    with pytest.raises(ValueError, match="call `init_process_group`"), context_parallel(kind.make()):
        pass
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    model = kind.make()
    name = type(model).__name__
    with pytest.raises(ValueError, match=f"{name} needs whole texts"), context_parallel(torch.nn.ModuleList([model])):
        pass
    with pytest.raises(ValueError, match="ModuleList needs whole texts"), context_parallel(torch.nn.ModuleList()):
        pass


def test_lengths_of_stretches_differ_by_one_token():
    assert cuts_of_text(10, 4) == [0, 3, 6, 8, 10]
    assert cuts_of_text(8, 4) == [0, 2, 4, 6, 8]
    with pytest.raises(ValueError, match="4 processes cannot share a text of 3 tokens"):
        cuts_of_text(3, 4)


@pytest.mark.parametrize("is_packed", [False, True])
def test_leaky_sums_of_stretches_compose(is_packed, monkeypatch):
    """Of one process that plays all of them: three vectors are all that a stretch needs of the others."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 3, 23, 4, generator=generator, dtype=torch.float64)
    leak, cuts = torch.tensor([0.01, 0.3, 2.0], dtype=torch.float64), cuts_of_text(23, 4)
    documents = torch.tensor([[0] * 8 + [1] * 15, [0] * 23]) if is_packed else None
    expected, _ = leaky_average(states, leak, document_ids=documents)
    sent = []
    for turn in ("send", "receive"):
        for rank, (begin, end) in enumerate(zip(cuts, cuts[1:], strict=False)):
            own = None if documents is None else documents[:, begin:end] - documents[:, [max(begin - 1, 0)]]
            last = None if documents is None else documents[:, [cut - 1 for cut in cuts[1:]]]
            lengths = torch.tensor(cuts).diff().expand(2, -1)
            states_of = StretchStates(Stretch(None, rank, cuts, None, own, lengths, last))
            sums, _ = leaky_average(states[:, :, begin:end], leak, document_ids=own)
            if turn == "send":
                sent.append(sums[:, :, -1])
                continue
            monkeypatch.setattr(Stretch, "gather", lambda self, tensor: torch.stack(sent))
            continued, before = states_of.continue_sum("contextual_sum", sums, None, leak)
            torch.testing.assert_close(continued, expected[:, :, begin:end], rtol=0, atol=1e-12)
            if begin:
                torch.testing.assert_close(before, expected[:, :, begin - 1 : begin], rtol=0, atol=1e-12)
