# SPDX-License-Identifier: Apache-2.0
"""A language model that answers requests, each answer beginning with given words: the generator of BabiStories."""

import functools
import importlib.util
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, cast

import torch
from accelerate import PartialState
from pydantic import Field, PositiveInt
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from training.files import checksum
from training.recipe import Section
from training.text.tokenizer import added_tokens, load_tokenizer


# The files of a local folder on which the answers depend: configuration, tokenizer, chat template and weights.
GENERATOR_FILES = ("*.json", "*.model", "*.jinja", "*.safetensors", "*.bin")


class GeneratorSection(Section):
    """The language model that writes the stories, and how its tokens are drawn."""

    model: str
    quantization: Literal["none", "4bit"] = "none"
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    max_new_tokens: PositiveInt = 512
    batch_size: PositiveInt

    @property
    def name(self) -> str:
        """The model's name for readers: on the Hub, or the last two parts of its folder's path."""
        folder = Path(self.model)
        return "/".join(folder.resolve().parts[-2:]) if folder.is_dir() else self.model

    def checksums(self) -> dict[str, str]:
        """Return the sha256 of the files that the answers depend on, by name; none for a model on the Hub."""
        files = sorted(file for pattern in GENERATOR_FILES for file in Path(self.model).glob(pattern))
        return {file.name: checksum(file) for file in files}

    def revision(self) -> str | None:
        """Return the commit of a model on the Hub; None for a folder."""
        return getattr(AutoConfig.from_pretrained(self.model, trust_remote_code=False), "_commit_hash", None)


def check_quantization(section: GeneratorSection) -> None:
    """Raise `ValueError` if the library that quantizes is asked for and missing."""
    if section.quantization == "4bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "generator.quantization is 4bit, which needs the library bitsandbytes: pip install bitsandbytes, or set "
            "generator.quantization=none"
        )


def _check_no_stacked_experts(name: str) -> None:
    """Raise `ValueError` if quantization would leave most of a model as it is.

    bitsandbytes packs linear layers only, and leaves out experts that transformers 5 stacks into one tensor. Without
    this check such a model would take several times the memory that 4 bit promises, and no message would show it
    (issue 1849 of bitsandbytes).
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name, trust_remote_code=False))
    # The weight of a linear layer has two dimensions, that of stacked experts three.
    stacked = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 2)
    total = model.num_parameters()
    if stacked > total / 10:
        raise ValueError(
            f"generator.quantization is 4bit, but {stacked / total:.0%} of the parameters of {name!r} are stacked "
            f"experts, which bitsandbytes leaves as they are: set generator.quantization=none on a GPU that holds its "
            f"{2 * total / 1e9:.1f} GB of bfloat16 weights, or take a generator without experts"
        )


def _check_prompts_stay_open(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise `ValueError` if the tokenizer ends each prompt, so that no answer could follow."""
    behind = [added for added in added_tokens(tokenizer) if added.endswith("behind")]
    # With a chat template, `answer` lets the tokenizer add nothing.
    if behind and tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of the generator {name!r} adds {behind[0]} each prompt, and no answer "
            "comes after the end: set add_eos_token=false in its tokenizer_config.json (or take that token out of "
            "the post_processor in its tokenizer.json), or take a generator with a chat template"
        )


class Generator:
    """A language model that answers requests, each answer beginning with given words.

    The model is loaded when the first answer is needed: a run that has only to be finished does without it.

    Args:
        section: the recipe's `generator`.
        state: of the processes; each has a copy of the model on its device.

    Raises:
        ValueError: model or tokenizer cannot be loaded.
    """

    def __init__(self, section: GeneratorSection, state: PartialState):
        self.section = section
        self.device = state.device
        # As its makers trained it: a model of others may need the begin token that its tokenizer adds.
        self.tokenizer = load_tokenizer(section.model, keep_added=True)
        _check_prompts_stay_open(section.model, self.tokenizer)
        if section.quantization == "4bit":
            _check_no_stacked_experts(section.model)

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        """The model, in evaluation mode, which samples as the recipe says."""
        section = self.section
        dtype = getattr(torch, section.dtype)
        options: dict[str, Any] = {"trust_remote_code": False, "dtype": dtype, "device_map": {"": self.device}}
        if section.quantization == "4bit":
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
        try:
            model = AutoModelForCausalLM.from_pretrained(section.model, **options)
        except UnpicklingError:  # its own message advises to run what is in the pickle
            raise ValueError(
                f"cannot load the generator {section.model!r}: its weights are a pickle of more than tensors"
            ) from None
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(
                f"cannot load the generator {section.model!r}: it has to be a folder with a causal language model, or "
                f"the name of one on the Hub that can be reached ({error})"
            ) from error
        end = model.generation_config.eos_token_id
        # In place of the model's own settings, which might hold a penalty or another limit that no recipe shows.
        model.generation_config = GenerationConfig(
            do_sample=True,
            temperature=section.temperature,
            top_p=section.top_p,
            top_k=section.top_k,
            max_new_tokens=section.max_new_tokens,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id if end is None else end,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return model.eval()

    def _format(self, prompt: str, beginning: str) -> str:
        """Return the text that the model continues."""
        if self.tokenizer.chat_template is not None:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": beginning}]
            return cast(str, self.tokenizer.apply_chat_template(turns, tokenize=False, continue_final_message=True))
        # A template may end with the opening itself.
        return prompt if prompt.endswith(beginning) else f"{prompt}\n\n{beginning}"

    def answer(self, prompts: list[str], beginnings: list[str], seed: int) -> list[str | None]:
        """Answer a batch of requests.

        Args:
            prompts: the requests; the user's turn, if the model knows turns.
            beginnings: the first words of each answer, none empty.
            seed: of the sampling: the same arguments give the same answers.

        Returns:
            Each answer with its beginning, but without the prompt. None where the tokenizer did not give the prompt
            back as it was, so that it is unknown where the answer begins.
        """
        texts = [self._format(*pair) for pair in zip(prompts, beginnings, strict=True)]
        batch = self.tokenizer(
            texts,
            padding=True,
            return_tensors="pt",
            return_token_type_ids=False,
            add_special_tokens=self.tokenizer.chat_template is None,  # a chat template has written them already
        ).to(self.device)
        model = cast(GenerationMixin, self.model)  # loaded before the seed: loading may draw random numbers
        torch.manual_seed(seed)
        with torch.inference_mode():
            ids = model.generate(**batch)
        # Decoded as a whole: a tokenizer may drop the space in front of what it takes for the first word.
        formatted, whole = (
            self.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for rows in (batch["input_ids"], ids)
        )
        return [
            beginning + text[len(prompt) :] if text.startswith(prompt) else None
            for beginning, prompt, text in zip(beginnings, formatted, whole, strict=True)
        ]
