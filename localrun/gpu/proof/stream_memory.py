"""The same by stream memory operations, which not every card and driver has: a fault here leaves host nodes in use."""

from __future__ import annotations

from localrun.gpu.proof.handover import measure
from localrun.gpu.proof.subject import Subject
from localrun.gpu.proof.task import Findings
from localrun.gpu.ways import STREAM_MEMORY


def prove(subject: Subject, findings: Findings) -> None:
    """Choose them if they are right and faster."""
    by_nodes_s = subject.task.choices["handover_s"]
    measure(subject, findings, STREAM_MEMORY)
    if not findings.choices["handover_s"] < by_nodes_s:
        findings.choices.clear()
