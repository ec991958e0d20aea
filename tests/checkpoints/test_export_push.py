"""Pushing an exported folder: asked for, private by default, and the folder stays."""

import json
from pathlib import Path

import pytest

import prunebench.download.push as push

# ---------------------------------------------------------------- pushing


class FakeApi:
    """Stands in for huggingface_hub.HfApi: remembers what it was asked to do."""

    calls: list
    public: bool | None  # of the repository; None where there is none

    def whoami(self):
        return {"name": "me"}

    def repo_info(self, name):
        from types import SimpleNamespace

        from huggingface_hub.errors import RepositoryNotFoundError

        if self.public is None:
            raised = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
            Exception.__init__(raised, "404")
            raise raised
        return SimpleNamespace(private=not self.public)

    def create_repo(self, name, *, private):
        self.calls.append(("create", name, private))

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        names = {path.name for path in Path(folder_path).iterdir()}
        self.calls.append(("upload", repo_id, names, commit_message))


@pytest.fixture
def api(monkeypatch):
    FakeApi.calls, FakeApi.public = [], None
    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    monkeypatch.setattr(push, "hub_problem", lambda: "")
    return FakeApi


@pytest.fixture
def answer(monkeypatch):
    """Sit at a terminal and answer what is asked."""

    def answering(said):
        monkeypatch.setattr("prunebench.cli.export._at_a_terminal", lambda: True)
        monkeypatch.setattr("typer.confirm", lambda *args, **kwargs: said)

    return answering


def test_pushing_a_new_repository_is_private(cli, checkpoint, api):
    outcome = cli("export", "ck", "-o", "out", "--push", "me/x", "--yes")
    created, uploaded = api.calls
    assert created == ("create", "me/x", True)
    assert uploaded[:2] == ("upload", "me/x")
    assert {"README.md", "model.safetensors"} <= uploaded[2]
    assert "private, new" in outcome.stderr and "with its paths" in outcome.stderr
    assert "pushed to https://huggingface.co/me/x" in outcome.stdout


def test_public_is_said(cli, checkpoint, api):
    outcome = cli("export", "ck", "-o", "out", "--push", "me/x", "--yes", "--public", "--json")
    assert api.calls[0] == ("create", "me/x", False)
    assert "public, new" in outcome.stderr
    assert json.loads(outcome.stdout)["pushed"] == "https://huggingface.co/me/x"


def test_a_public_repository_is_not_filled_unasked(cli, checkpoint, api):
    api.public = True
    output = cli("export", "ck", "-o", "out", "--push", "me/x", "--yes", code=2).output
    assert "exists and is public" in output
    assert not Path("out").exists()
    cli("export", "ck", "-o", "out", "--push", "me/x", "--yes", "--public")
    assert [call[0] for call in api.calls] == ["upload"]


def test_it_asks(cli, checkpoint, api, answer):
    answer(False)
    assert "nothing was pushed" in cli("export", "ck", "-o", "out", "--push", "me/x").stdout
    assert api.calls == [] and Path("out/README.md").exists()
    answer(True)
    cli("export", "ck", "-o", "again", "--push", "me/x")
    assert [call[0] for call in api.calls] == ["create", "upload"]


def test_without_a_terminal_it_needs_yes(cli, checkpoint, api):
    assert "add --yes" in cli("export", "ck", "-o", "out", "--push", "me/x", code=2).output
    assert not Path("out").exists()


def test_without_a_network(cli, checkpoint):
    output = cli("export", "ck", "-o", "out", "--push", "me/x", "--yes", code=3).output
    assert "cannot push to me/x" in output and "the hub cannot be reached" in output
    assert not Path("out").exists()


def test_without_a_login(cli, checkpoint, api, monkeypatch):
    from huggingface_hub.errors import LocalTokenNotFoundError

    def nobody(self):
        raise LocalTokenNotFoundError("no token was found")

    monkeypatch.setattr(FakeApi, "whoami", nobody)
    output = cli("export", "ck", "-o", "out", "--push", "me/x", "--yes", code=3).output
    assert "hf auth login" in output


def test_a_push_that_fails_leaves_the_folder(cli, checkpoint, api, monkeypatch):
    def broken(self, **kwargs):
        raise OSError("the line went dead")

    monkeypatch.setattr(FakeApi, "upload_folder", broken)
    output = cli("export", "ck", "-o", "out", "--push", "me/x", "--yes", code=5).output
    assert "the line went dead" in output and "hf upload me/x out" in output
    assert Path("out/README.md").exists()


@pytest.mark.parametrize("name", ["x", "a/b/c", "me/", "me/x y"])
def test_names_of_no_repository(cli, checkpoint, api, name):
    output = cli("export", "ck", "-o", "out", "--push", name, "--yes", code=2).output
    assert "is not a repository name" in output


def test_options_of_pushing_need_it(cli, checkpoint):
    assert "go with --push" in cli("export", "ck", "-o", "out", "--public", code=2).output
