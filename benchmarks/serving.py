# SPDX-License-Identifier: Apache-2.0
"""Tables of what `serving/vllm/benchmark.py` and `serving/edge/benchmark.py` measured, each in its own environment."""

from typing import Any

from training.tables import markdown_table


def vllm_table(report: dict[str, Any]) -> str:
    """Return tokens a second of vLLM beside `transformers serve`, a row for each number of requests at a time."""
    versions = report["versions"]
    setting = (
        f"Memory Mosaic ({report['parameters'] / 1e6:.1f} M parameters), float32, {report['cores']} cores of "
        f"{report['cpu']}, vLLM {versions['vllm']} beside `transformers serve` {versions['transformers']}, torch "
        f"{versions['torch']}; prompts of {report['prompt_length']} tokens, answers of {report['answer_length']}; "
        f"both servers are started in each of {report['rounds']} rounds.\n"
    )
    columns = ["requests at a time", "vLLM, tokens/s", "transformers, tokens/s", "ratio (lowest to highest)"]
    rows = [
        [
            str(row["requests"]),
            f"{row['vllm']:.0f}",
            f"{row['transformers']:.0f}",
            f"{row['ratio']:.2f} ({min(row['ratios']):.2f} to {max(row['ratios']):.2f})",
        ]
        for row in report["rows"]
    ]
    return "\n".join([setting, markdown_table(columns, "rrrr", rows)])


def edge_table(report: dict[str, Any]) -> str:
    """Return the sizes of edge programs and their speeds on one core, a row for each program."""
    versions = report["versions"]
    setting = (
        f"Memory Mosaic ({report['parameters'] / 1e6:.1f} M parameters, {report['bytes_of_weights'] / 1e6:.1f} MB of "
        f"weights), one core of {report['cpu']}, ExecuTorch {versions['executorch']}, onnxruntime "
        f"{versions['onnxruntime']}, transformers {versions['transformers']} (eager, a growing memory), torch "
        f"{versions['torch']}; {report['answer_length']} tokens behind {report['prompt_length']}, room for "
        f"{report['max_length']}; median of {report['rounds']} rounds in turn.\n"
    )
    columns = ["program", "prefill, MB", "decode, MB", "tokens/s", "beside transformers"]
    rows = []
    for row in report["rows"]:
        sizes = row["bytes"] or {}
        megabytes = [f"{sizes[name] / 1e6:.1f}" if name in sizes else "" for name in ("prefill", "decode")]
        rows.append([row["program"], *megabytes, f"{row['tokens_per_second']:.0f}", f"{row['ratio']:.2f}"])
    return "\n".join([setting, markdown_table(columns, "lrrrr", rows)])
