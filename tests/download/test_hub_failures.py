"""Every way in which the hub fails, for everything that is fetched from it or pushed to it.

Each says what it was, in three lines, with the exit code of a missing resource (a push that fails
half way: of what could not be saved), and within seconds.
"""

import functools
import gzip
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from prunebench.calibration.texts import load_text
from prunebench.download import hub as module
from prunebench.download.hub import hub_problem, hub_reachable
from prunebench.download.push import find_repository, push_folder
from prunebench.errors import IncompatibleData, MissingResource, SaveError
from prunebench.models.masks import open_masks
from prunebench.models.source import catalog, fetch_model, find_model
from prunebench.progress import Silent
from tests.hub import Hub, use
from tests.hub_repos import TOKEN, files_of

C4 = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"
WIKI = "b08601e04326c79dfdd32d625aee71d232d685c3"
PORTAL = b"<!doctype html><title>Welcome to our wireless network</title>"


def push(hub=None):
    """Push a folder of one small and one large file."""
    folder = Path("out")
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text("# a model\n")
    (folder / "model.safetensors").write_bytes(b"weights" * 99)
    push_folder(folder, find_repository("me/x"), private=True, message="by a test")


FETCH = {
    "model": lambda: fetch_model(find_model("llama2-7b"), Silent()),
    "model without revision": lambda: fetch_model(find_model("org/plain"), Silent()),
    "masks": lambda: open_masks("hub:org/masks", [], Silent(), dict),
    "wikitext2": lambda: load_text("wikitext2", use="evaluation", progress=Silent()),
    "c4": lambda: load_text("c4", use="calibration", progress=Silent()),
}


@pytest.fixture
def full(loopback, tiny_folder, tmp_path, monkeypatch):
    """A hub that has all of it."""
    monkeypatch.chdir(tmp_path)
    llama = catalog()["llama2-7b"]
    loopback.model(llama.hub, tiny_folder, sha=llama.revision)
    loopback.model("org/plain", tiny_folder)
    loopback.model("org/masks", {"mask_compressed.npz": b"masks"})
    shards = ("en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz")
    loopback.dataset("allenai/c4", dict.fromkeys(shards, b"c4"), sha=C4)
    file = "wikitext-2-raw-v1/test-00000-of-00001.parquet"
    loopback.dataset("Salesforce/wikitext", {file: b"wiki"}, sha=WIKI)
    return loopback


@pytest.fixture
def no_pauses(monkeypatch):
    """huggingface_hub waits between its attempts; a test need not."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def with_token(hub, monkeypatch, token=TOKEN):
    monkeypatch.setenv("HF_TOKEN", token)


def repositories(hub):
    return [*hub.models.values(), *hub.datasets.values()]


def gated(hub, monkeypatch):
    for repo in repositories(hub):
        repo.gated = True


def without_revisions(hub, monkeypatch):
    for repo in repositories(hub):
        repo.commits.clear()


def without_files(hub, monkeypatch):
    for repo in repositories(hub):
        for commit in repo.commits.values():
            commit.files.clear()


def without_repositories(hub, monkeypatch):
    hub.models.clear()
    hub.datasets.clear()


def failing(hub, monkeypatch, **how):
    hub.fail(**how)


def impatient(hub, monkeypatch):
    """Answer `HEAD /`, and then nothing."""
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        monkeypatch.setattr(constants, name, 0.2)
    monkeypatch.setattr(module, "READ_SECONDS", 0.2)
    monkeypatch.setattr(module, "WRITTEN_SECONDS", 0.2)
    hub.fail(silent=True)


def behind_a_wrong_certificate(hub, monkeypatch):
    secure = Hub(certificate=Path(__file__).parents[1] / "data" / "loopback.pem")
    hub.also.append(secure)
    use(monkeypatch, secure.url, Path(constants.HF_HUB_CACHE).parent)


def away(hub, monkeypatch):
    hub.stop()


def limited(hub, monkeypatch):
    hub.fail(status=429, headers={"Retry-After": "300"})


def forbidden(hub, monkeypatch):
    hub.fail(status=403, headers={"X-Error-Message": "Your token lacks the permission"})


def both(*steps):
    def run(hub, monkeypatch):
        for step in steps:
            step(hub, monkeypatch)

    return run


WRONG = functools.partial(with_token, token="hf_" + "b" * 34)
FAILURES = {
    "wrong token": (WRONG, "does not accept the token (401: Invalid credentials"),
    "gated, no login": (gated, "it is gated, and you are not logged in (401)"),
    "gated, not accepted": (both(gated, with_token), "this login has no access to it yet (403)"),
    "forbidden": (forbidden, "the hub forbids it (403: Your token lacks the permission)"),
    "no repository": (without_repositories, "it is not on the hub, or is private"),
    "no repository, login": (both(without_repositories, with_token), "it is not on the hub, or"),
    "no revision": (without_revisions, "it has no revision"),
    "no file": (without_files, "this file is not in it"),
    "limited": (limited, "too many requests (429); it asks to wait 300 s"),
    "trouble": (functools.partial(failing, status=503), "the hub is in trouble (503"),
    "cut": (functools.partial(failing, cut=True), "the connection to the hub was cut"),
    "portal": (functools.partial(failing, page=PORTAL), "is not a hub"),
    "silent": (impatient, "did not answer in time"),
    "certificate": (behind_a_wrong_certificate, "the hub's certificate cannot be verified"),
    "away": (away, "the hub cannot be reached: [Errno "),
}


@pytest.mark.parametrize("name", ["nonsense/", "a/b/c", "-a/b", "a--b/c", "x" * 97])
def test_a_name_that_no_repository_can_have_is_refused(full, name):
    with pytest.raises(MissingResource, match="cannot be downloaded") as caught:
        open_masks(f"hub:{name}", [], Silent(), dict)
    assert caught.value.fix


OF_A_MODEL = {"no file": "only pickled weights"}


@pytest.mark.parametrize("kind", FAILURES)
@pytest.mark.parametrize("thing", FETCH)
def test_each_failure_says_what_it_was_whatever_was_fetched(
    full, monkeypatch, no_pauses, thing, kind
):
    breaks, says = FAILURES[kind]
    breaks(full, monkeypatch)
    start_time = time.monotonic()
    with pytest.raises(MissingResource) as caught:
        FETCH[thing]()
    error = caught.value
    assert time.monotonic() - start_time < 10
    if thing.startswith("model"):
        says = OF_A_MODEL.get(kind, says)
    assert says in str(error), str(error)
    assert error.exit_code == 3 and error.where and error.fix
    assert str(error).count("\n") == 2 and all(len(line) < 400 for line in str(error).splitlines())


def records():
    """A data set of one of lm-eval's tasks, which only the hub has."""
    import datasets

    from prunebench.evaluate.records import record_source

    with record_source(Silent()):
        datasets.load_dataset("Salesforce/wikitext")


OF_RECORDS = ["wrong token", "forbidden", "limited", "trouble", "cut", "silent", "away"]


@pytest.mark.parametrize("kind", OF_RECORDS)
def test_each_failure_of_a_task_s_records_says_what_it_was(full, monkeypatch, no_pauses, kind):
    breaks, says = FAILURES[kind]
    breaks(full, monkeypatch)
    with pytest.raises(MissingResource) as caught:
        records()
    if kind == "silent":  # the library datasets drops the reason
        says = "the hub cannot be reached"
    assert says in caught.value.where


OF_A_PUSH = ["wrong token", "forbidden", "limited", "trouble", "cut", "silent", "certificate",
             "away"]  # fmt: skip


@pytest.mark.parametrize("kind", OF_A_PUSH)
def test_each_failure_of_a_push_says_what_it_was_before_any_work(full, monkeypatch, kind):
    with_token(full, monkeypatch)
    breaks, says = FAILURES[kind]
    breaks(full, monkeypatch)
    with pytest.raises(MissingResource) as caught:
        find_repository("me/x")
    assert caught.value.what == "cannot push to me/x"
    assert says.split(": Invalid")[0] in caught.value.where
    assert caught.value.fix


@pytest.mark.parametrize("kind", ["forbidden", "limited", "trouble", "cut", "silent"])
@pytest.mark.parametrize("at", ["POST /api/repos/create", "PUT /upload/", "POST .*/commit/"])
def test_a_push_that_fails_half_way_says_what_it_was(full, monkeypatch, no_pauses, kind, at):
    with_token(full, monkeypatch)
    breaks, says = FAILURES[kind]
    breaks(full, monkeypatch)
    full.failures[0].where = module.re.compile(at)
    with pytest.raises(SaveError, match="cannot push to me/x") as caught:
        push()
    assert says in caught.value.where
    assert "hf upload me/x out" in caught.value.fix


def test_a_push_makes_a_private_repository_with_the_very_files(full, monkeypatch):
    with_token(full, monkeypatch)
    push()
    repo = full.models["me/x"]
    assert repo.private
    pushed = repo.commits[repo.refs["main"]].files
    assert pushed == files_of(Path("out"))
    assert find_repository("me/x").exists


# ---------------------------------------------------------------- half way


@pytest.mark.parametrize("thing", FETCH)
@pytest.mark.parametrize("kind", ["trouble", "cut", "silent", "limited"])
def test_a_failure_half_way_says_what_it_was(full, monkeypatch, no_pauses, thing, kind):
    """The listing arrives, the large file does not."""
    breaks, says = FAILURES[kind]
    breaks(full, monkeypatch)
    full.failures[0].where = module.re.compile("GET /lfs/")
    with pytest.raises(MissingResource) as caught:
        FETCH[thing]()
    assert says in caught.value.where


@pytest.mark.parametrize("kind", ["trouble", "cut"])
def test_a_failure_that_passes_is_asked_about_again(full, monkeypatch, no_pauses, kind):
    monkeypatch.setattr(module, "PAUSES_SECONDS", (0.0, 0.0))
    FAILURES[kind][0](full, monkeypatch)
    full.failures[0].times = 2
    assert (
        fetch_model(find_model("llama2-7b"), Silent()).revision == catalog()["llama2-7b"].revision
    )


def test_a_failure_of_the_storage_behind_the_hub_is_one_of_the_network(full, monkeypatch):
    """hf_xet itself, sent to a storage where nothing listens: it raises RuntimeError."""
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "0")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    full.xet = True
    for thing in ("model", "masks", "c4"):
        with pytest.raises(MissingResource, match="cannot be downloaded") as caught:
            FETCH[thing]()
        assert isinstance(caught.value.__cause__, RuntimeError)
        assert "the hub's storage failed: " in caught.value.where
        assert "HF_HUB_DISABLE_XET=1" in caught.value.fix


@pytest.mark.parametrize("error", [OSError(28, "No space left"), RuntimeError("x (os error 28)")])
def test_a_full_disk_is_no_failure_of_the_network(full, monkeypatch, error):
    def broken(*args, **kwargs):
        raise error

    monkeypatch.setattr("huggingface_hub.file_download.http_get", broken)
    for thing in ("model", "masks", "c4"):
        with pytest.raises(SaveError, match="cannot write") as caught:
            FETCH[thing]()
        assert "free space" in caught.value.fix


@pytest.mark.parametrize("thing", ["masks", "wikitext2", "c4"])
def test_what_is_whole_but_not_what_it_should_be_is_incompatible(full, thing):
    """Not a full disk, nor a bug: the file has its hash, and is no parquet, gzip or zip file."""
    with pytest.raises(IncompatibleData) as caught:
        FETCH[thing]()
    assert caught.value.exit_code == 4 and caught.value.where and caught.value.fix


def test_a_text_that_lacks_its_column_is_incompatible(full):
    file = "en/c4-train.00000-of-01024.json.gz"
    full.dataset("allenai/c4", {file: gzip.compress(b'{"words": "a"}\n')}, sha=C4)
    with pytest.raises(IncompatibleData, match="cannot be read as a text"):
        FETCH["c4"]()


# ---------------------------------------------------------------- time


def test_a_slow_hub_is_a_hub(full):
    """Four seconds were "not reachable" once."""
    assert module.CONNECT_SECONDS >= 10 and module.READ_SECONDS >= 30
    full.fail("HEAD /", seconds=0.3)
    assert hub_reachable()


@pytest.mark.slow
def test_a_hub_that_takes_four_seconds_is_used(full):
    full.fail(".*", seconds=4.0, times=4)
    assert fetch_model(find_model("llama2-7b"), Silent()).path.is_dir()


def test_a_hub_that_never_answers_is_given_up(full, monkeypatch):
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.2)
    full.fail("HEAD /", silent=True)
    start_time = time.monotonic()
    assert "did not answer" in hub_problem()
    assert time.monotonic() - start_time < 3


def test_every_request_has_a_time_limit(full, monkeypatch):
    """Also those that huggingface_hub sends with `timeout=None`."""
    from huggingface_hub import HfApi, get_session

    module.limit_times()
    seen = []
    client = get_session()
    hooks = client.event_hooks
    hooks["request"].append(lambda request: seen.append(dict(request.extensions["timeout"])))
    client.event_hooks = hooks
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    HfApi().whoami()
    HfApi().model_info("org/plain", timeout=None)
    list(HfApi().list_repo_tree("org/plain"))
    fetch_model(find_model("org/plain"), Silent())
    push()
    assert len(seen) > 10
    for limits in seen:
        assert all(0 < limits[name] <= 300 for name in ("connect", "read", "write", "pool")), limits


def test_a_user_who_sets_longer_limits_has_them(full, monkeypatch):
    from huggingface_hub import get_session

    module.limit_times()
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 300)
    seen = []
    client = get_session()
    hooks = client.event_hooks
    hooks["request"].append(lambda request: seen.append(request.extensions["timeout"]["read"]))
    client.event_hooks = hooks
    client.head(full.url, timeout=200)
    client.head(full.url, timeout=None)
    assert seen == [200, 300]
