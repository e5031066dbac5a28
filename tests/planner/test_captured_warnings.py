"""What is warned of while a plan is made: in the report, not between its lines."""

import logging
import warnings

from dtcp.distributed.mesh import Degrees
from dtcp.models import gemma4
from dtcp.planner import cluster, report, search
from dtcp.planner.captured_warnings import captured_warnings
from dtcp.planner.setup import Setup
from dtcp.planner.subject import FamilyModel
from dtcp.sequence.documents import Documents


def test_plan_keeps_what_dtcp_warns_of_and_prints_nothing(capfd):
    with captured_warnings() as said:
        logging.getLogger("dtcp.anything").warning("%s is whole", "a layer")
        logging.getLogger("dtcp.anything").warning("%s is whole", "a layer")
        logging.getLogger("transformers.models").warning("a slow kernel")
        warnings.warn("a thing of a test", stacklevel=1)
    assert said == ["a layer is whole"]
    assert capfd.readouterr().err == ""


def test_plan_of_kv_heads_that_tp_does_not_divide_says_so_in_the_report():
    documents = Documents.single(1, 256)
    subject = FamilyModel("tiny", "gemma4", gemma4.tiny())
    eight = cluster.cluster_of("4xH100")
    planner = search.Planner(subject, eight, search.Workload(documents, 1))
    found = planner.candidate(Setup(Degrees(tp=4), documents))
    lines = [x for x in report.detail_lines(found, eight) if x.startswith("warning ")]
    assert lines and all("tp=4 does not divide the" in line for line in lines)
