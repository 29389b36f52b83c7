"""Memory, processor, disks and environment: what is said of a machine follows from its facts."""

from __future__ import annotations

from pathlib import Path

import pytest

from qpref.doctor import host
from qpref.doctor.host import environment_findings, lock_findings, memory_findings, processor_findings

GIB = 2**30


def write(path, text):
    path.write_text(text)
    return path


def said(findings):
    return [(finding.status, finding.message) for finding in findings]


def test_a_containers_limit_is_told_where_it_is_below_the_machines(tmp_path):
    meminfo = write(tmp_path / "meminfo", f"MemTotal: {64 * 2**20} kB\nMemAvailable: {32 * 2**20} kB\n")
    assert said(memory_findings(meminfo, None)) == [("ok", "32.0 GiB of 64.0 GiB are available")]
    assert said(memory_findings(meminfo, (128 * GIB, GIB))) == [("ok", "32.0 GiB of 64.0 GiB are available")]
    _, (status, message) = said(memory_findings(meminfo, (8 * GIB, 2 * GIB)))
    assert (status, message.partition(";")[0]) == ("note", "this container may have 8.0 GiB, and has 2.0 GiB")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("fpu avx2", ["2 cores of AMD X", "this processor has no units for bf16"]),
        (
            "fpu avx512_bf16",
            ["2 cores of AMD X, with AVX512-BF16", "bitsandbytes repacks 4-bit weights on AVX512-BF16"],
        ),
        ("fpu amx_bf16 avx512_bf16", ["2 cores of AMD X, with AMX and AVX512-BF16", "bitsandbytes repacks"]),
    ],
)
def test_bf16_units_and_the_trap_of_repacked_weights_are_told(tmp_path, flags, words):
    cpuinfo = write(tmp_path / "cpuinfo", f"processor\t: 0\nmodel name\t: AMD X\nflags\t\t: {flags}\n")
    messages = [finding.message for finding in processor_findings(cpuinfo, 2, {})]
    assert len(messages) == len(words)
    assert all(message.startswith(word) for message, word in zip(messages, words, strict=True))


def test_fewer_threads_than_cores_are_told(tmp_path):
    nothing = tmp_path / "none"
    assert len(list(processor_findings(nothing, 8, {"OMP_NUM_THREADS": "8"}))) == 1
    *_, last = processor_findings(nothing, 8, {"OMP_NUM_THREADS": "2"})
    assert (last.status, last.message.partition(",")[0]) == ("note", "OMP_NUM_THREADS is 2")


def test_a_folder_that_can_be_written_and_locked_is_left_as_it_was(tmp_path):
    assert list(lock_findings(tmp_path, "cache")) == []
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_a_problem(tmp_path):
    path = write(tmp_path / "file", "")
    (found,) = lock_findings(path / "cache", "cache")
    assert found.status == "problem"
    assert "can't be written" in found.message
    (other,) = lock_findings(path / "runs", "current folder")
    assert other.status == "note"


def test_locks_that_exclude_nobody_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "excludes", lambda path: False)
    (found,) = lock_findings(tmp_path, "cache")
    assert found.message.startswith("locks don't hold in ")
    assert list(tmp_path.iterdir()) == []


def test_variables_and_mounts_that_matter_are_told():
    calm = environment_findings({"HF_HUB_OFFLINE": "0"}, 8 * GIB, False)
    assert said(calm) == [("ok", "no variable or mount that is known to matter")]
    found = environment_findings({"HF_HUB_OFFLINE": "1", "QPREF_DISABLE": "loss-kto"}, 64 * 2**20, True)
    starts = ["HF_HUB_OFFLINE is set", "QPREF_DISABLE leaves out loss-kto", "WSL2: ", "/dev/shm has 64.0 MiB"]
    messages = [finding.message for finding in found]
    assert [message[: len(start)] for message, start in zip(messages, starts, strict=True)] == starts


def test_every_note_of_this_machine_has_a_fix():
    for finding in host.examine_host():
        assert finding.fix or finding.status == "ok"
    assert list(Path().glob(".qpref-doctor*")) == []
