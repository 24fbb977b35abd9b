"""The live page's server sends the listed runs and the page's files, to those who may see them."""

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from cluster.__main__ import main
from cluster.dashboard.runs import Catalogue
from cluster.dashboard.server import app
from tests.run_folders import NASTY, TOKEN, line, write


@pytest.fixture
def root(tmp_path) -> Path:
    write(tmp_path / "runs", [line(1), line(2)], "one")
    write(tmp_path / "runs", [line(1)], NASTY)
    write(tmp_path, [line(1)], "secret")
    write(tmp_path / "runs" / "bench", [line(1)], "in")
    return tmp_path / "runs"


def client(root: Path, address: str = "http://127.0.0.1:8000", **options: Any) -> TestClient:
    return TestClient(app(Catalogue([], root), [], **options), base_url=address)


def test_the_list_has_the_runs_of_the_folder_and_follows_it(root):
    with client(root) as page:
        answer = page.get("/api/runs").json()
        assert {run["name"] for run in answer["runs"]} == {"one", NASTY, "bench/in"}
        assert answer["chosen"] == [] and answer["charts"][0]["series"][0] == "kl_to_generator"
        write(root, [line(1)], "later")
        names = {run["name"]: run["status"] for run in page.get("/api/runs").json()["runs"]}
        assert names["later"] == "going"


def test_an_unchanged_run_is_not_sent_again(root):
    with client(root) as page:
        tag = page.get("/api/run", params={"name": "one"}).json()["tag"]
        asked = {"name": "one", "have": tag}
        assert page.get("/api/run", params=asked).status_code == 204
        write(root, [line(1), line(2), line(3)], "one")
        assert page.get("/api/run", params=asked).json()["curves"]["loss"]["x"] == [1, 2, 3]
        summary = {"status": "finished", "failure": NASTY}
        (root / "one" / "summary.json").write_text(json.dumps(summary))
        answer = page.get("/api/run", params=asked).json()
        assert answer["complete"] and answer["notes"] == [f"The run failed: {NASTY}"]


@pytest.mark.parametrize("name", [
    "../secret", "..", ".", "", "/", "one/", "one/../one", "one\0", "/etc", "bench",
    "bench/in/../in", "None", "ONE",
])  # fmt: skip
def test_only_listed_names_are_runs_so_no_path_leads_out(root, name):
    with client(root) as page:
        assert page.get("/api/run", params={"name": name}).status_code == 404


@pytest.mark.parametrize("path", [
    "/../pyproject.toml", "/%2e%2e/%2e%2e/pyproject.toml", "/page.html", "/server.py",
    "//etc/passwd", "/page.js/../server.py",
])  # fmt: skip
def test_no_file_but_the_pages_is_served(root, path):
    with client(root) as page:
        assert page.get(path).status_code == 404


def test_every_answer_forbids_scripts_and_styles_that_are_not_the_pages(root):
    with client(root, token=TOKEN) as page:
        for path in ("/", "/page.js", "/api/runs", "/none"):
            policy = page.get(path).headers["content-security-policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy
        with client(root) as opened:
            html = opened.get("/").text
    assert "<script>" not in html and "<style" not in html and "://" not in html


def test_without_the_token_nothing_is_told_and_it_is_said_once(root, caplog):
    with client(root, token=TOKEN) as page:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"},
                        {"Authorization": "Bearer é".encode()}, {"Cookie": "onpolicy-8000=x"},
                        {"Cookie": f"onpolicy-8000={TOKEN}"}):  # fmt: skip
            for path in ("/", "/api/runs", "/api/run?name=one", "/plotly.js", "/?token=wrong",
                         "/?token=%ff"):  # fmt: skip
                answer = page.get(path, headers=headers, follow_redirects=False)
                assert answer.status_code == 401 and "one" not in answer.text.split()
        assert len(caplog.records) == 1 and TOKEN not in caplog.text


def test_the_token_opens_the_page_as_a_header_or_once_in_the_address(root):
    with client(root, token=TOKEN) as page:
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        assert page.get("/api/runs", headers=bearer).status_code == 200
        assert page.get("/api/runs").status_code == 401
        answer = page.get(f"/?run=one&token={TOKEN}", follow_redirects=False)
        assert answer.status_code == 303 and answer.headers["location"] == "/?run=one"
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=strict" in cookie and TOKEN not in cookie
        assert page.get("/api/runs").status_code == 200  # by the cookie


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""]
)
def test_on_loopback_another_sites_name_for_this_machine_is_refused(root, host):
    with client(root) as page:
        assert page.get("/api/runs", headers={"Host": host}).status_code == 421
        for name in ("127.0.0.1:8000", "localhost", "localhost:9", "[::1]:8000", "[::1]"):
            assert page.get("/api/runs", headers={"Host": name}).status_code == 200
    with client(root, token=TOKEN, loopback=False) as page:
        headers = {"Host": "node-3:8000", "Authorization": f"Bearer {TOKEN}"}
        assert page.get("/api/runs", headers=headers).status_code == 200


@pytest.mark.parametrize("arguments, said", [
    (["--host", "0.0.0.0"], "beyond loopback: set a token"),
    (["--host", "::"], "beyond loopback: set a token"),
    (["--host", "node-3"], "beyond loopback: set a token"),
    (["--host", "0.0.0.0", "--token", "short"], "shorter than 16"),
    (["none"], "no run at none"),
    (["--port", "99999"], "cannot serve on 127.0.0.1:99999"),
    (["--runs", "nowhere"], "no folder of runs at nowhere"),
])  # fmt: skip
def test_what_cannot_be_served_is_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ONPOLICY_DASHBOARD_TOKEN", raising=False)
    (tmp_path / "runs").mkdir()
    assert main(["dashboard", *arguments]) == 2
    errors = capsys.readouterr().err
    assert said in errors and errors.count("\n") == 1
