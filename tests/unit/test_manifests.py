"""The manifests fit the schemas of those who read them, and what a job brings is pinned."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from cluster.jobs import submit as module
from cluster.jobs.submit import IN_JOB, pinned, runtime_env
from cluster.placement import needs
from configs.load import ConfigError, prepare

ROOT = Path(__file__).parents[2]
JOBS = ROOT / "cluster" / "jobs"
CRD = json.loads((ROOT / "tests" / "data" / "rayjob_crd.json").read_text())
RAY_SCHEMA = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"


def read(name: str) -> Any:
    return yaml.safe_load((JOBS / name).read_text())


def test_the_rayjob_fits_kuberays_schema():
    jsonschema.validate(read("rayjob.yaml"), CRD["schema"])


@pytest.mark.parametrize(
    "path, value",
    [
        (["spec", "shutdownAfterJobFinishes"], "yes"),
        (["spec", "ttlSeconds"], 600),
        (["spec", "rayClusterSpec", "authOptions", "mode"], "none"),
        (["spec", "rayClusterSpec", "networkPolicy", "mode"], "Deny"),
        (["spec", "rayClusterSpec", "workerGroupSpecs", 0, "replicas"], "1"),
        (["spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "gpus"], 8),
    ],
)
def test_the_schema_that_is_kept_refuses_what_kuberay_would(path, value):
    manifest = inner = read("rayjob.yaml")
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, CRD["schema"])


def test_the_rayjob_has_a_token_a_network_policy_an_end_and_the_groups_that_its_run_names():
    spec = read("rayjob.yaml")["spec"]
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "onpolicy-token"}
    assert cluster["networkPolicy"]["mode"] == "DenyAllIngress"
    assert spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] > 0
    assert cluster["rayVersion"] == ray.__version__
    preset, *settings = re.search(r"cluster train (.*)", spec["entrypoint"])[1].split()
    config = prepare(preset, settings)
    groups = {f"role={group['labels']['role']}": group for group in cluster["workerGroupSpecs"]}
    wanted: dict[str, float] = dict.fromkeys(groups, 0.0)
    for need in needs(config, config.rollout.actors).values():
        wanted[need.on] += need.number * need.bundle.get("GPU", 0.0)
    for label, gpus in wanted.items():
        container = groups[label]["template"]["spec"]["containers"][0]
        has = int(container["resources"]["limits"].get("nvidia.com/gpu", 0))
        assert gpus <= has * groups[label]["maxReplicas"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        security = group["template"]["spec"]["containers"][0]["securityContext"]
        assert security["runAsNonRoot"] and not security["allowPrivilegeEscalation"]


@pytest.mark.parametrize("name", ["aws.yaml", "on_premise.yaml"])
def test_the_cluster_files_fit_rays_schema_and_keep_dashboard_and_token_to_themselves(name):
    manifest = read(name)
    schema = json.loads(RAY_SCHEMA.read_text())
    jsonschema.validate(manifest, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest | {"max_worker": 3}, schema)
    (head,) = [line for line in manifest["head_start_ray_commands"] if "--head" in line]
    assert "--dashboard-host=127.0.0.1" in head
    assert "RAY_AUTH_MODE=token" in " ".join(manifest["setup_commands"])
    assert "~/.ray/auth_token" in manifest["file_mounts"]
    assert f"=={ray.__version__}" in " ".join(manifest["setup_commands"])


def test_what_is_installed_is_pinned_to_the_versions_that_are_tested():
    *lines, constraints = pinned()
    versions = (ROOT / "constraints.txt").read_text().lower().split()
    assert all(re.sub(r"\[.*\]", "", line) in versions for line in lines) and len(lines) >= 10
    assert "ray[default,serve]==2.60.0" in lines
    assert constraints == f"-c {IN_JOB}/constraints.txt"
    assert runtime_env(install=True)["pip"]["packages"] == pinned()


def test_a_job_brings_the_checkout_without_results_and_gives_a_stop_time():
    content = runtime_env()
    assert {".git", "runs", "tests"} <= set(content["excludes"])
    assert int(content["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 120
    assert content["working_dir"] == str(ROOT) and "pip" not in content


def test_a_folder_that_would_vanish_with_the_job_is_refused_and_made_whole_on_this_machine():
    with pytest.raises(ConfigError, match="run.dir=runs"):
        module._absolute("runs", "https://head.example.com:8265")
    assert module._absolute("/shared/runs", "https://head.example.com") == []
    for here in ("http://127.0.0.1:8265", "http://localhost:1", "http://[::1]:8265"):
        assert module._absolute("runs", here) == [f"run.dir={Path('runs').resolve()}"]
