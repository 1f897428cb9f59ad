"""Memory-pressure experiments: what becomes of throughput, latency and hits as pages run out."""

from .calibrate import calibrate
from .clairvoyant import Belady
from .costs import CostModel, HostCosts, Measured, Program, Roofline
from .fitted import Fitted
from .real import ProgramTimer, run
from .replay import hit_rate
from .report import Record, Report
from .sessions import agents, branches, rollouts
from .simulate import simulate
from .traces import read_azure, read_mooncake
from .workload import Request, chats, poisson, prefix_tree

__all__ = [
    "Belady",
    "CostModel",
    "Fitted",
    "HostCosts",
    "Measured",
    "Program",
    "ProgramTimer",
    "Record",
    "Report",
    "Request",
    "Roofline",
    "agents",
    "branches",
    "calibrate",
    "chats",
    "hit_rate",
    "poisson",
    "prefix_tree",
    "read_azure",
    "read_mooncake",
    "rollouts",
    "run",
    "simulate",
]
