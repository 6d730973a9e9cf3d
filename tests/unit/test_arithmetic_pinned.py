"""Our arithmetic from recorded scalars, pinned: a change of one bit anywhere shows here.

A change that is meant breaks replay of every journal written before: raise the journal's version
(`journal.store.FORMAT`) and the wire's with it, and say so in CHANGELOG.md.

What a model computes is not pinned. Its matrix products differ with the processor, and what they
give, the scalars, is recorded.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from functools import cache
from typing import Any

import numpy as np
import pinned
import pytest

GOLDEN = {
    "draw gaussian": "5457f5f5eb7ec96c572e55f6c1fed79677753617434488948fe6df2b3cd654ba",
    "draw tabulated": "0f10163f73cbe98cb16b05398ed5ec5fcd4326eda7c3d136ac138990764a65f7",
    "draw rademacher": "003a2756a0b8b6c45278ac908390046a91cf36b3567724dae3a31b3c1bdcfc88",
    "rounds sgd shared fresh": "20d8d8d3895a2e90c9b8ce0e105230f7714988306cbe355430418fd6e73c9bb5",
    "rounds sgd shared pool": "ed800230de435e1848f0c0f80dd50a143c41a60ac799287ad73dec5c0bde70b9",
    "rounds sgd per-client fresh": "44528749c95380a070f3de27fd233e3c163555eba1d8fc11695931769ced3a9a",
    "rounds sgd per-client pool": "92e926f5c1d1071d151112a1245fd352d6f043c62a96f380059b41641977f46f",
    "rounds momentum shared fresh": "f844d9289715060bbde56742b2dc9ccf38e6eacc20e9c5b44a6b6c65f35a4314",
    "rounds momentum shared pool": "52d9bda336cf69e4b9162a42886313ccb5b82527d0cac02ce764123bcb670ea5",
    "rounds momentum per-client fresh": "812119eae2dad4b9987e251320445ffc2d7babe7b58f2c34e48e283945402e86",
    "rounds momentum per-client pool": "71df0d17e356ab50a88fafeae4343cb18bb7af5d889ef97dc689c97eb6a67f69",
    "rounds adam shared fresh": "42af89202d3dfa3a6c88e088c6c309c6c518053281d445e4bfc278999f7561b2",
    "rounds adam shared pool": "414645940c5cf03112d6b9e9bd0b36d9831822d79a35029542752d6431052839",
    "rounds adam per-client fresh": "89033151efa29b1860013506dee61cfc838371cccfab130f2d4bbfaaa5342016",
    "rounds adam per-client pool": "51f3707e01904bc24a270cfd1d58c71aa9d968b0988a47b9524cc5134a693d31",
    "rounds sgd of tiny scalars": "a9d60394b994f6d86faa890527ad84cfc9863e01073e602d8fa9e8efc2f68f40",
    "rounds momentum of tiny scalars": "e623d7e25cd2b65fb64baeb96571cf18d45e14979489866414419a59ee94d568",
    "rounds adam of tiny scalars": "9622687d263685aa96720edf80a775fa8b67ecb917f146a1d1f2c5af03c81b58",
    "virtual paths sgd": "e1d9007e7b5c7c64733bef54592e65e68a40d232c08dfb79268a0b5a3dd4b7d6",
    "virtual paths momentum": "30ce425b2efde3cac3b3ee1cc7a577f4c60b95e08f193827bb0c99fef6715f9d",
    "virtual paths adam": "4c890b2de65216bc33d61b67ef8c8ec751190f2fbed1a6c9af65021dc95a60aa",
    "gradip shared": "2d2d1f7705158793aff27f0ac0683f08d513c135535c3b6eb3622fc99b8ef1a2",
    "gradip per-client": "e5fc9de6e988cb01407e69314437997b96a545961d92ee18f08480f0ed44958e",
    "metrics": "425e19469f6d835a0770cf31bd65a7b249f4189a93901ee44ed7f0363c9e716d",
    "orders": "8cdaf8a9a297c0c841f858aa17c9fd0c526be2c219258c7f0fee79f3e85ea33c",
}
X86 = platform.machine().lower() in ("x86_64", "amd64")


@cache
def found() -> dict[str, str]:
    return pinned.digests()


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str) -> None:
    assert found()[name] == GOLDEN[name]


def test_everything_is_pinned() -> None:
    assert list(found()) == list(GOLDEN)


# The same on other processors


def in_process(*arguments: str, **environment: str) -> dict[str, Any]:
    """Digests and controls of a process of its own with these variables set."""
    command = [sys.executable, pinned.__file__, *arguments]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def check_control(there: dict[str, Any], name: str) -> None:
    """Were other instructions used at all? Called when all digests were found to agree."""
    if there["controls"][name] == pinned.controls()[name]:
        pytest.skip(f"the {name} is the same too: this machine has no other instructions to use")


def test_same_without_the_vector_instructions_of_this_processor() -> None:
    """numpy picks code by the processor; here it is left with what every processor has."""
    umath = np._core._multiarray_umath
    used = [name for name in umath.__cpu_dispatch__ if umath.__cpu_features__.get(name)]
    there = in_process(NPY_DISABLE_CPU_FEATURES=" ".join(used))
    assert there["digests"] == GOLDEN
    check_control(there, "exp")


@pytest.mark.parametrize("processor", ["Haswell", "Prescott"])
def test_same_with_the_matrix_products_of_another_processor(processor: str) -> None:
    """OpenBLAS has code for each; no matrix product takes part."""
    there = in_process(OPENBLAS_CORETYPE=processor, PYTHONHASHSEED="1")
    assert there["digests"] == GOLDEN
    check_control(there, "matrix product")


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_same_beside_torch_for_another_processor(capability: str) -> None:
    there = in_process("--torch", ATEN_CPU_CAPABILITY=capability)
    assert there["digests"] == GOLDEN
    if X86:
        assert there["torch"] == capability.upper()


def test_same_for_several_threads() -> None:
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    assert in_process(**dict.fromkeys(names, "4"))["digests"] == GOLDEN
