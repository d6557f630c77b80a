"""Associative recall, measured: the MQAR task (paper section 3; Zoology, arXiv 2312.04927)."""

from based.recall.mqar import mqar
from based.recall.probe import Probe, ProbeResult, run_probe

__all__ = ["Probe", "ProbeResult", "mqar", "run_probe"]
