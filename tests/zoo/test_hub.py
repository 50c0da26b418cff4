"""The hub, played by a server on loopback: downloads, their faults, the cache, offline mode, uploads."""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch

from zoo.bundles import catalog, foreign, hub
from zoo.bundles import store as bundles
from zoo.cli import main
from zoo.errors import BundleError, CardError, HubError


class FakeHub(ThreadingHTTPServer):
    """The few endpoints of a hub that huggingface_hub uses, with switches for faults."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits: dict[str, dict[str, bytes]] = {}
        self.refs: dict[str, str] = {}
        self.requests: list[str] = []
        self.cut_after: dict[str, int] = {}  # file -> bytes after which the connection breaks
        self.cuts_left = 0
        self.tampered: dict[str, bytes] = {}  # file -> what is sent instead
        self.down = False
        self.halted: threading.Event | None = None  # set where half of the weights are on their way
        self.portal = b""  # a page that answers everything
        self.repositories: dict[str, dict[str, bytes]] = {}  # further ones: name -> files

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def publish(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Commit files and move a branch there; the commit's name."""
        content = b"".join(name.encode() + data for name, data in sorted(files.items()))
        commit = hashlib.sha1(content).hexdigest()
        self.commits[commit] = files
        self.refs[branch] = commit
        return commit

    def publish_folder(self, folder: Path, branch: str = "main") -> str:
        return self.publish({path.name: path.read_bytes() for path in folder.iterdir()}, branch)

    def downloads(self, suffix: str) -> int:
        return sum(line.startswith("GET") and line.endswith(suffix) for line in self.requests)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *_: Any) -> None: ...

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_json(self, value: Any) -> None:
        self.send(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub_server, path = self.server, unquote(urlsplit(self.path).path)
        hub_server.requests.append(f"{self.command} {path}")
        if hub_server.down:
            return self.send(503)
        if hub_server.portal:
            return self.send(200, hub_server.portal, Content_Type="text/html")
        parts = path.strip("/").split("/")
        repository = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if repository in hub_server.repositories:
            hub_server.publish(hub_server.repositories[repository], repository)
            parts[3 if parts[0] != "api" else 5 : 4 if parts[0] != "api" else 6] = [repository]
        elif repository != "owner/tiny":
            return self.send(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        revision = parts[3] if parts[0] != "api" else parts[5] if len(parts) > 5 else "main"
        commit = hub_server.refs.get(revision, revision)
        files = hub_server.commits.get(commit)
        if files is None:
            return self.send(404, X_Error_Code="RevisionNotFound", X_Error_Message="no revision")
        if parts[0] == "api":
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            return self.send_json({"id": repository, "sha": commit, "siblings": siblings})
        name = "/".join(parts[4:])
        if name not in files:
            return self.send(404, X_Error_Code="EntryNotFound", X_Error_Message="no file")
        self.send_file(name, hub_server.tampered.get(name, files[name]), commit)

    def send_file(self, name: str, data: bytes, commit: str) -> None:
        start = 0
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
        body = data[start:]
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.server.halted is not None and name == "weights.safetensors":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.server.halted.set()
            with contextlib.suppress(OSError):
                self.rfile.read()  # until the other side is gone
            self.close_connection = True
            return
        cut = self.server.cut_after.get(name)
        if cut is not None and self.server.cuts_left:
            self.server.cuts_left -= 1
            self.wfile.write(body[:cut])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(body)

    def do_POST(self) -> None:
        hub_server, path = self.server, urlsplit(self.path).path
        hub_server.requests.append(f"POST {path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer hf_test":
            return self.send(401)
        if path.endswith("/repos/create"):
            return self.send_json({"url": f"{hub_server.url}/owner/tiny", "id": "owner/tiny"})
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return self.send_json(
                {
                    "files": [
                        {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for file in files
                    ]
                }
            )
        lines = [json.loads(line) for line in body.splitlines()]
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        commit = hub_server.publish(files)
        self.send_json(
            {
                "commitUrl": f"{hub_server.url}/owner/tiny/commit/{commit}",
                "commitOid": commit,
                "success": True,
            }
        )


@pytest.fixture
def server(monkeypatch) -> Iterator[FakeHub]:
    with FakeHub() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.delenv("ZOO_OFFLINE", raising=False)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
        yield running
        running.shutdown()
        thread.join()


def cached_files() -> list[str]:
    root = catalog.cache_folder() / "hub"
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def assert_nothing_half_written() -> None:
    assert [name for name in cached_files() if "snapshots" in name or "refs" in name] == []


def test_a_model_from_the_hub(server: FakeHub, tiny_bundle, tiny_model) -> None:
    commit = server.publish_folder(tiny_bundle)
    model = bundles.load("hf://owner/tiny")
    assert torch.equal(model.first.weight, tiny_model.first.weight)
    assert cached_files() == [
        "names/graph--tiny-test",
        "owner--tiny/lock",
        "owner--tiny/refs/main",
        f"owner--tiny/snapshots/{commit}/card.yaml",
        f"owner--tiny/snapshots/{commit}/weights.safetensors",
    ]
    bundles.load("hf://owner/tiny@main")
    assert server.downloads("weights.safetensors") == 1, "the second time it comes from the cache"
    assert catalog.find("graph/tiny-test").folder == model.zoo_info.folder, "and it is found by its name"


def test_pull_shows_the_licence_before_first_use(server: FakeHub, tiny_bundle, capsys) -> None:
    server.publish_folder(tiny_bundle)
    assert main(["pull", "hf://owner/tiny"]) == 0
    assert "Licence: Apache-2.0; made from Cora, CC0" in capsys.readouterr().out


def test_a_pinned_commit_needs_no_server_once_it_is_cached(server: FakeHub, tiny_bundle) -> None:
    commit = server.publish_folder(tiny_bundle)
    hub.fetch(f"hf://owner/tiny@{commit}")
    before = len(server.requests)
    assert hub.fetch(f"hf://owner/tiny@{commit}").folder.name == commit
    assert len(server.requests) == before


def test_a_branch_that_moves(server: FakeHub, tiny_bundle, save_tiny, tmp_path: Path) -> None:
    server.publish_folder(tiny_bundle)
    server.publish_folder(tiny_bundle, "feature/x".replace("/", "-"))
    assert hub.fetch("hf://owner/tiny").card.version == "1.0.0"
    server.publish_folder(save_tiny(tmp_path / "new", version="1.1.0"))
    assert hub.fetch("hf://owner/tiny").card.version == "1.1.0"
    assert hub.fetch("hf://owner/tiny@feature-x").card.version == "1.0.0"
    assert catalog.list_models("graph/tiny-test@*") == ["graph/tiny-test@1.0.0", "graph/tiny-test@1.1.0"]
    assert catalog.find("graph/tiny-test").card.version == "1.1.0"
    assert catalog.find("graph/tiny-test@1.0.0").card.version == "1.0.0"


def test_only_the_bundle_is_fetched(server: FakeHub, tiny_bundle) -> None:
    files = {path.name: path.read_bytes() for path in tiny_bundle.iterdir()}
    commit = server.publish({**files, "setup.py": b"import os", "other.safetensors": b"x"})
    hub.fetch("hf://owner/tiny")
    there = catalog.cache_folder() / "hub" / "owner--tiny" / "snapshots" / commit
    assert sorted(path.name for path in there.iterdir()) == ["card.yaml", "weights.safetensors"]


# -- faults on the way


def test_a_connection_that_breaks_once_is_resumed(server: FakeHub, tiny_bundle) -> None:
    server.publish_folder(tiny_bundle)
    server.cut_after, server.cuts_left = {"weights.safetensors": 1000}, 1
    bundles.load("hf://owner/tiny")
    assert server.downloads("weights.safetensors") == 2


def test_a_connection_that_keeps_breaking(server: FakeHub, tiny_bundle) -> None:
    server.publish_folder(tiny_bundle)
    server.cut_after, server.cuts_left = {"weights.safetensors": 0}, 1000
    with pytest.raises(HubError, match=r"weights.safetensors did not arrive whole: .*Nothing was kept"):
        hub.fetch("hf://owner/tiny")
    assert_nothing_half_written()
    server.cuts_left = 0
    assert hub.fetch("hf://owner/tiny").card.name == "graph/tiny-test"


def test_a_broken_update_keeps_the_old_one(server: FakeHub, tiny_bundle, save_tiny, tmp_path: Path) -> None:
    server.publish_folder(tiny_bundle)
    old = hub.fetch("hf://owner/tiny")
    server.publish_folder(save_tiny(tmp_path / "new", version="1.1.0"))
    server.cut_after, server.cuts_left = {"weights.safetensors": 0}, 1000
    with pytest.raises(HubError, match="did not arrive whole"):
        hub.fetch("hf://owner/tiny")
    assert hub.fetch("hf://owner/tiny", offline=True) == old
    bundles.load_bundle(old)


def test_other_bytes_of_the_same_length(server: FakeHub, tiny_bundle) -> None:
    server.publish_folder(tiny_bundle)
    right = (tiny_bundle / "weights.safetensors").read_bytes()
    server.tampered["weights.safetensors"] = right[:-1] + bytes([right[-1] ^ 1])
    with pytest.raises(HubError, match="another hash or size than its card says"):
        hub.fetch("hf://owner/tiny")
    assert_nothing_half_written()


def test_a_card_that_lies_about_the_size(server: FakeHub, tiny_bundle) -> None:
    files = {path.name: path.read_bytes() for path in tiny_bundle.iterdir()}
    server.publish({**files, "weights.safetensors": files["weights.safetensors"] + b"x"})
    with pytest.raises(HubError, match="bytes, but its card says"):
        hub.fetch("hf://owner/tiny")
    assert server.downloads("weights.safetensors") == 0, "refused before anything large is fetched"
    assert_nothing_half_written()


@pytest.mark.parametrize(
    "change,error,message",
    [
        (lambda files: files.pop("card.yaml"), HubError, "has no card.yaml, so it holds no bundle"),
        (lambda files: files.pop("weights.safetensors"), HubError, "lacks 'weights.safetensors'"),
        (
            lambda files: files.update({"card.yaml": b"a: &a [*a]"}),
            CardError,
            "^hf:.*/card.yaml:1: a YAML alias",
        ),
        (
            lambda files: files.update({"card.yaml": b"x" * (1 << 20)}),
            HubError,
            "1048576 bytes. Is it a card",
        ),
        (
            lambda files: files.update({"card.yaml": files["card.yaml"].replace(b"file: ", b"file: ../")}),
            CardError,
            "bare file name",
        ),
    ],
)
def test_a_repository_that_is_no_bundle(server: FakeHub, tiny_bundle, change, error, message: str) -> None:
    files = {path.name: path.read_bytes() for path in tiny_bundle.iterdir()}
    change(files)
    server.publish(files)
    with pytest.raises(error, match=message):
        hub.fetch("hf://owner/tiny")
    assert_nothing_half_written()


def test_what_is_not_there(server: FakeHub, tiny_bundle) -> None:
    server.publish_folder(tiny_bundle)
    with pytest.raises(HubError, match="hf://owner/huge@main: there is no such repository, or it is private"):
        bundles.load("hf://owner/huge")
    with pytest.raises(HubError, match="hf://owner/tiny@v9: .* no such branch, tag or commit"):
        bundles.load("hf://owner/tiny@v9")
    with pytest.raises(BundleError, match="version 1.0.0 of graph/tiny-test, but 2.0.0"):
        bundles.load("hf://owner/tiny", version="2.0.0")


@pytest.mark.parametrize(
    "text",
    [
        "hf://",
        "hf://owner",
        "hf://owner/",
        "hf://owner/a/b",
        "hf://../x",
        "hf://owner/..",
        "hf://owner/a..b",
        "hf://owner/x@",
        "hf://owner/x@../y",
        "hf://owner/x@a..b",
        "hf://owner/x y",
        "hf://owner/x\n",
        "https://x/y",
        "hf://owner/x@/etc",
        "hf://owner\\x/y",
        "hf://o/" + "a" * 200,
    ],
)
def test_no_hub_reference(text: str) -> None:
    with pytest.raises(HubError, match="no hub reference. Write hf://owner/name"):
        hub.parse_reference(text)


def test_references() -> None:
    assert hub.parse_reference("hf://Owner-1/na.me_2") == hub.HubReference("Owner-1/na.me_2", "main")
    assert hub.parse_reference("hf://o/n@refs/pr/1").revision == "refs/pr/1"


# -- offline


@pytest.mark.parametrize("variable", ["ZOO_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_mode(server: FakeHub, tiny_bundle, monkeypatch, variable: str) -> None:
    commit = server.publish_folder(tiny_bundle)
    monkeypatch.setenv(variable, "1")
    with pytest.raises(HubError, match=r"hf://owner/tiny@main is not in the cache .*offline mode is on"):
        bundles.load("hf://owner/tiny")
    assert server.requests == []
    monkeypatch.setenv(variable, "0")
    hub.pull("hf://owner/tiny")
    asked = len(server.requests)
    monkeypatch.setenv(variable, "1")
    assert bundles.load("hf://owner/tiny").zoo_info.folder.name == commit
    assert bundles.load(f"hf://owner/tiny@{commit}").zoo_info.folder.name == commit
    with pytest.raises(HubError, match="not in the cache"):
        bundles.load("hf://owner/tiny@v2")
    assert len(server.requests) == asked
    bundles.load("hf://owner/tiny", offline=False)
    assert len(server.requests) > asked, "told otherwise"


@pytest.mark.parametrize("how", ["refused", "busy"])
def test_a_hub_that_gives_no_answer(server: FakeHub, tiny_bundle, monkeypatch, caplog, how: str) -> None:
    server.publish_folder(tiny_bundle)
    hub.fetch("hf://owner/tiny")
    if how == "refused":
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens on the discard port
    else:
        server.down = True
    assert hub.fetch("hf://owner/tiny").card.name == "graph/tiny-test"
    assert "cannot be reached" in caplog.text and "using the copy in the cache" in caplog.text
    shutil.rmtree(catalog.cache_folder())
    with pytest.raises(HubError, match="cannot be reached.*Check the connection and HF_ENDPOINT"):
        hub.fetch("hf://owner/tiny")


# -- the cache


def test_a_damaged_copy_is_refused_and_pulled_anew(server: FakeHub, tiny_bundle) -> None:
    server.publish_folder(tiny_bundle)
    weights = hub.pull("hf://owner/tiny").weights
    right = weights.read_bytes()
    weights.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    with pytest.raises(BundleError, match="damaged"):
        bundles.load("hf://owner/tiny")
    with pytest.raises(BundleError, match="damaged"):
        hub.pull("hf://owner/tiny", offline=True)
    assert hub.pull("hf://owner/tiny").weights.read_bytes() == right
    bundles.load("hf://owner/tiny")


def test_two_processes_at_once(server: FakeHub, tiny_bundle) -> None:
    server.publish_folder(tiny_bundle)
    code = textwrap.dedent("""
        import sys, time
        from zoo.bundles import hub
        import huggingface_hub, filelock
        print("ready", flush=True)
        sys.stdin.readline()
        print(hub.pull("hf://owner/tiny").folder)
    """)
    environment = {**os.environ, "PYTHONPATH": str(Path(hub.__file__).parents[1])}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(3)
    ]
    assert all(worker.stdout.readline() == "ready\n" for worker in workers)
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    results = [worker.communicate(timeout=60) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0], [err for _, err in results]
    assert len({out for out, _ in results}) == 1
    assert server.downloads("weights.safetensors") == 1, "the others waited for the first"
    catalog.open_bundle(results[0][0].strip()).check()


def test_a_pull_that_is_killed_midway(server: FakeHub, tiny_bundle) -> None:
    """kill -9 with half of the weights on the disk: nothing can be loaded, and the next pull cleans up."""
    server.publish_folder(tiny_bundle)
    server.halted = threading.Event()
    environment = {**os.environ, "PYTHONPATH": str(Path(hub.__file__).parents[2])}
    code = "from zoo.bundles import hub; hub.pull('hf://owner/tiny')"
    puller = subprocess.Popen([sys.executable, "-c", code], env=environment)
    assert server.halted.wait(60) and puller.poll() is None
    puller.kill()
    puller.wait(60)
    server.halted = None
    snapshots = catalog.cache_folder() / "hub" / "owner--tiny" / "snapshots"
    assert [path.suffix for path in snapshots.iterdir()] == [".tmp"], "the kill came in the middle"
    assert "graph/tiny-test" not in catalog.list_models()
    with pytest.raises(HubError, match="not in the cache"):
        bundles.load("hf://owner/tiny", offline=True)
    bundles.load_bundle(hub.pull("hf://owner/tiny"))
    assert [path.suffix for path in snapshots.iterdir()] == [""], "what the killed one left is swept"
    assert not [name for name in cached_files() if ".tmp" in name or "incomplete" in name]


@pytest.mark.parametrize("where", ["cache", "hub", "repository"])
def test_a_file_where_the_cache_should_be(server: FakeHub, tiny_bundle, where: str) -> None:
    server.publish_folder(tiny_bundle)
    cache = catalog.cache_folder()
    blocked = {"cache": cache, "hub": cache / "hub", "repository": cache / "hub" / "owner--tiny"}[where]
    blocked.parent.mkdir(parents=True, exist_ok=True)
    blocked.write_text("in the way")
    with pytest.raises(HubError, match="Set ZOO_CACHE to a folder that can be written"):
        hub.fetch("hf://owner/tiny")
    assert blocked.read_text() == "in the way"


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_cache_that_cannot_be_written(server: FakeHub, tiny_bundle, monkeypatch, number: int) -> None:
    server.publish_folder(tiny_bundle)

    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number), str(self))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", refuse)
        with pytest.raises(HubError, match=f"{os.strerror(number)}.*Set ZOO_CACHE"):
            hub.fetch("hf://owner/tiny")
    hub.fetch("hf://owner/tiny")
    with monkeypatch.context() as patched:  # what is cached can be used without writing
        patched.setattr(Path, "mkdir", refuse)
        patched.setattr("zoo.bundles.hub.atomic_write", refuse)
        assert hub.fetch("hf://owner/tiny").card.name == "graph/tiny-test"
        bundles.load("hf://owner/tiny")


def test_a_disk_that_fills_up_on_the_way(server: FakeHub, tiny_bundle, monkeypatch) -> None:
    server.publish_folder(tiny_bundle)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("huggingface_hub.file_download.http_get", full)
        with pytest.raises(HubError, match="No space left on device.*Set ZOO_CACHE"):
            hub.fetch("hf://owner/tiny")
    assert_nothing_half_written()


# -- uploads


def test_what_is_pushed_can_be_loaded(server: FakeHub, tiny_bundle, monkeypatch, tiny_model) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    pushed = hub.push(tiny_bundle, "hf://owner/tiny")
    assert pushed.url is not None and pushed.url.startswith(f"{server.url}/owner/tiny/commit/")
    assert list(pushed.files) == ["card.yaml", "weights.safetensors"]
    assert torch.equal(bundles.load("hf://owner/tiny").first.weight, tiny_model.first.weight)


def test_pushing_without_a_token(server: FakeHub, tiny_bundle, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(HubError, match="nobody is logged in. Run `hf auth login`, or set HF_TOKEN"):
        hub.push(tiny_bundle, "hf://owner/tiny")
    listed = hub.push(tiny_bundle, "hf://owner/tiny", dry_run=True)
    assert listed.url is None and listed.files["card.yaml"] == (tiny_bundle / "card.yaml").stat().st_size
    assert server.requests == []


def test_pushing_what_is_refused(server: FakeHub, tiny_bundle, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="the upload failed: .*401"):
        hub.push(tiny_bundle, "hf://owner/tiny")
    monkeypatch.setenv("ZOO_OFFLINE", "1")
    with pytest.raises(HubError, match="offline mode is on"):
        hub.push(tiny_bundle, "hf://owner/tiny")
    (tiny_bundle / "weights.safetensors").write_bytes(b"x")
    with pytest.raises(BundleError, match="truncated"):
        hub.push(tiny_bundle, "hf://owner/tiny", dry_run=True)


# -- bundles that stand on another one


@pytest.fixture
def on_base(tiny_bundle, tiny_model, tiny_fields, tmp_path: Path) -> Path:
    """A bundle in a folder of its own, without the base on which it stands (the tiny one) beside it."""
    fields = tiny_fields | {"name": "graph/tiny-tuned"}
    folder = bundles.save(tiny_model, tmp_path / "tuned", card=fields, base=tiny_bundle)
    (tmp_path / "alone").mkdir()
    return folder.rename(tmp_path / "alone" / "tuned")


def files_of(folder: Path, base: Path | None) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files | ({f"base/{path.name}": path.read_bytes() for path in base.iterdir()} if base else {})


def test_a_base_comes_along(server: FakeHub, on_base: Path, tiny_bundle: Path, tiny_model) -> None:
    commit = server.publish(files_of(on_base, tiny_bundle))
    bundle = hub.pull("hf://owner/tiny")
    assert torch.equal(bundles.load_bundle(bundle).first.weight, tiny_model.first.weight)
    there = f"owner--tiny/snapshots/{commit}"
    assert [name for name in cached_files() if "/base/" in name] == [
        f"{there}/base/card.yaml",
        f"{there}/base/weights.safetensors",
    ]
    (bundle.folder / "base" / "weights.safetensors").write_bytes(b"x")
    with pytest.raises(BundleError, match="truncated"):
        bundles.load_bundle(bundle)
    bundles.load_bundle(hub.pull("hf://owner/tiny"))


def test_a_base_that_is_here_is_not_fetched(server: FakeHub, on_base: Path, tiny_bundle, monkeypatch) -> None:
    server.publish(files_of(on_base, tiny_bundle))
    monkeypatch.setenv("ZOO_PATH", str(tiny_bundle))
    bundles.load("hf://owner/tiny")
    assert server.downloads("base/weights.safetensors") == 0
    assert not any("base" in name for name in cached_files())


def test_a_base_that_is_nowhere_or_another_one(server: FakeHub, on_base, tiny_bundle, save_tiny) -> None:
    server.publish(files_of(on_base, None))
    with pytest.raises(HubError, match="neither on this machine nor in the repository's folder 'base'"):
        hub.fetch("hf://owner/tiny")
    other = save_tiny(tiny_bundle.parent / "other", version="1.1.0")
    server.publish(files_of(on_base, other))
    with pytest.raises(HubError, match="'base' holds other weights than those of graph/tiny-test@1.0.0"):
        shutil.rmtree(tiny_bundle)
        hub.fetch("hf://owner/tiny")
    assert_nothing_half_written()


def test_a_base_is_pushed_with_it(server: FakeHub, on_base: Path, tiny_bundle: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with pytest.raises(BundleError, match="not on this machine"):
        hub.push(on_base, "hf://owner/tiny", dry_run=True)
    with monkeypatch.context() as patched:
        patched.setenv("ZOO_PATH", str(tiny_bundle))
        pushed = hub.push(on_base, "hf://owner/tiny")
    own = ["card.yaml", "weights.safetensors"]
    assert list(pushed.files) == [*own, *(f"base/{name}" for name in own)]
    bundles.load("hf://owner/tiny")


def test_the_dense_twin_comes_along(
    server: FakeHub, tiny_bundle, save_tiny, tiny_fields, tmp_path, monkeypatch
):
    """What is pulled on another machine is compared and verified beside its own twin."""
    metric = {key: value for key, value in tiny_fields["metrics"][0].items() if key != "dense"}
    method = {"name": "dense", "hyperparameters": {}, "seed": 0}
    changes = {"method": method, "dense_twin": None, "metrics": [metric]}
    dense = save_tiny(tmp_path / "apart" / "dense", name="graph/tiny-dense", **changes)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with monkeypatch.context() as patched:
        patched.setenv("ZOO_PATH", str(dense.parent))
        pushed = hub.push(tiny_bundle, "hf://owner/tiny")
    assert list(pushed.files)[2:] == ["twin/card.yaml", "twin/weights.safetensors"]
    bundle = hub.pull("hf://owner/tiny")
    twin = catalog.twin_of(bundle)
    assert twin.folder == bundle.folder / "twin" and bundles.load_bundle(twin) is not None
    assert catalog.list_models("graph/tiny*") == ["graph/tiny-test"], "it does not take a bare name"
    files = {path.name: path.read_bytes() for path in tiny_bundle.iterdir()}
    other = {f"twin/{path.name}": path.read_bytes() for path in tiny_bundle.iterdir()}
    server.publish(files | other)
    with pytest.raises(
        HubError, match="'twin' holds graph/tiny-test@1.0.0, the card's dense twin is graph/tiny-dense"
    ):
        hub.fetch("hf://owner/tiny")
    monkeypatch.setenv("ZOO_PATH", str(dense.parent))
    assert not (hub.pull("hf://owner/tiny").folder / "twin").exists(), "the one that is known here counts"


# -- names, locks and what is left behind


def test_a_name_stays_with_the_repository_that_brought_it(
    server: FakeHub, tiny_bundle, save_tiny, tmp_path: Path, caplog
) -> None:
    server.publish_folder(tiny_bundle)
    first = hub.pull("hf://owner/tiny")
    server.repositories["evil/tiny"] = files_of(save_tiny(tmp_path / "evil", version="9.0.0"), None)
    second = hub.pull("hf://evil/tiny")
    assert "calls itself graph/tiny-test, which is the name of hf://owner/tiny" in caplog.text
    assert catalog.find("graph/tiny-test").folder == first.folder, "though the other version is higher"
    assert catalog.list_models("graph/tiny-test@*") == ["graph/tiny-test@1.0.0"]
    assert bundles.load("hf://evil/tiny").zoo_info.folder == second.folder
    hub.pull("hf://evil/tiny", rebind=True)
    assert catalog.find("graph/tiny-test").folder == second.folder
    server.publish_folder(save_tiny(tmp_path / "new", version="1.1.0"))
    assert hub.pull("hf://owner/tiny").card.version == "1.1.0"
    assert catalog.find("graph/tiny-test").folder == second.folder


def test_two_claims_and_no_binding(server: FakeHub, tiny_bundle, save_tiny, tmp_path: Path) -> None:
    server.publish_folder(tiny_bundle)
    hub.pull("hf://owner/tiny")
    server.repositories["evil/tiny"] = files_of(save_tiny(tmp_path / "evil", version="9.0.0"), None)
    hub.pull("hf://evil/tiny")
    shutil.rmtree(catalog.cache_folder() / "hub" / "names")
    with pytest.raises(BundleError, match="comes from hf://evil/tiny and hf://owner/tiny.*--rebind"):
        catalog.find("graph/tiny-test")


@pytest.mark.parametrize("twin", ["../../somewhere", "/etc", "hf://evil/twin", "graph/x@main", "."])
def test_a_twin_is_a_name(save_tiny, tiny_fields, tmp_path: Path, twin: str) -> None:
    metric = tiny_fields["metrics"][0] | {"dense": tiny_fields["metrics"][0]["dense"] | {"name": twin}}
    with pytest.raises(CardError, match="dense_twin: expected domain/slug"):
        save_tiny(tmp_path / "b", dense_twin=twin, metrics=[metric])


def test_a_login_page_is_no_hub(server: FakeHub, tiny_bundle) -> None:
    server.portal = b"<html>Welcome to the airport</html>"
    with pytest.raises(HubError, match="does not answer like a hub"):
        hub.fetch("hf://owner/tiny")


def test_waiting_for_another_pull_is_said_and_ends(server: FakeHub, tiny_bundle, caplog, monkeypatch) -> None:
    from filelock import FileLock

    commit = server.publish_folder(tiny_bundle)
    folder = catalog.cache_folder() / "hub" / "owner--tiny"
    left = folder / "snapshots" / f".{commit}.abc.tmp"
    left.mkdir(parents=True)
    (left / "weights.safetensors").write_bytes(b"half")
    monkeypatch.setattr(hub, "LOCK_TIMEOUT", 0.2)
    with (
        FileLock(folder / "lock"),
        pytest.raises(HubError, match="another process has held .*lock for 0.2 s"),
    ):
        hub.fetch("hf://owner/tiny")
    assert "waiting up to" in caplog.text and left.exists()
    hub.fetch("hf://owner/tiny")
    assert not left.exists(), "what a killed pull left goes with the next one"


FOREIGN = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights",
    "unet/model.safetensors": b"more",
    "pytorch_model.bin": b"a pickle",
    "README.md": b"words",
}


def test_a_model_of_another_library_is_fetched_without_its_pickles(server: FakeHub, monkeypatch) -> None:
    server.repositories["acme/net"] = FOREIGN
    folder = foreign.fetch_folder("hf://acme/net")
    wanted = {name: data for name, data in FOREIGN.items() if not name.endswith((".bin", ".md"))}
    assert folder is not None and {name: (folder / name).read_bytes() for name in wanted} == wanted
    assert not (folder / "pytorch_model.bin").exists() and server.downloads("model.bin") == 0
    before = len(server.requests)
    monkeypatch.setenv("ZOO_OFFLINE", "1")
    assert foreign.fetch_folder("hf://acme/net") == folder and len(server.requests) == before
    assert foreign.fetch_folder("hf://acme/other") is None  # the bundles' door says that it is not here
    with pytest.raises(HubError, match="not in the cache"):
        hub.fetch("hf://acme/other")


def test_pull_brings_a_model_of_another_library(server: FakeHub, monkeypatch, capsys) -> None:
    server.repositories["acme/net"] = FOREIGN
    assert main(["pull", "hf://acme/net"]) == 0
    said = capsys.readouterr()
    assert "a model of another library" in said.out and "zoo sparsify hf://acme/net" in said.err
    commit = server.refs["acme/net"]
    before = len(server.requests)
    assert foreign.fetch_folder(f"hf://acme/net@{commit}").name == commit and len(server.requests) == before
    del server.repositories["acme/net"]
    server.repositories["acme/other"] = FOREIGN
    with pytest.raises(HubError, match="files of 34 bytes, expected 3; not fetched"):
        foreign.fetch_folder("hf://acme/other", expected_bytes=3)
    assert server.downloads("model.safetensors") == 2


def test_a_fetch_of_a_foreign_model_goes_on_where_it_broke(server: FakeHub) -> None:
    server.repositories["acme/net"] = FOREIGN
    server.cut_after["unet/model.safetensors"], server.cuts_left = 2, 99
    with pytest.raises(HubError, match="did not arrive whole"):
        foreign.fetch_folder("hf://acme/net")
    server.cut_after.clear()
    assert foreign.fetch_folder("hf://acme/net") is not None
    whole = [line for line in server.requests if line.startswith("GET") and line.endswith("main/config.json")]
    assert len(whole) <= 1


def test_a_bundle_is_none_of_the_foreign_models(server: FakeHub, tiny_bundle) -> None:
    server.publish_folder(tiny_bundle)
    assert foreign.fetch_folder("hf://owner/tiny") is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b"x"}, "no safetensors"),
        ({"../evil.safetensors": b"x"}, "outside of its folder"),
        ({".git/x.safetensors": b"x"}, "outside of its folder"),
    ],
)
def test_foreign_models_that_are_refused(server: FakeHub, files, message: str) -> None:
    server.repositories["acme/net"] = files
    with pytest.raises(HubError, match=message):
        foreign.fetch_folder("hf://acme/net")


def test_a_foreign_model_that_does_not_fit_on_the_disk(server: FakeHub, monkeypatch) -> None:
    server.repositories["acme/net"] = FOREIGN
    monkeypatch.setattr(foreign.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 3))
    with pytest.raises(HubError, match="has 3 free"):
        foreign.fetch_folder("hf://acme/net")


def test_sparsify_takes_a_hub_id_of_another_library(server: FakeHub, monkeypatch, tmp_path: Path) -> None:
    taken = []

    def handler(folder, method, origin, out, **_):
        taken.append((sorted(path.name for path in folder.iterdir() if path.suffix == ".json"), origin.name))
        assert f"hf://acme/net@{folder.name}" in origin.command and len(folder.name) == 40
        return "done"

    server.repositories["acme/net"] = FOREIGN
    monkeypatch.setattr("zoo.cli.make.foreign_folder", lambda model: ("llm", handler))
    words = ["sparsify", "hf://acme/net", "--method", "wanda", "--out", str(tmp_path / "out")]
    assert main(words) == 0 and taken == [(["config.json"], "llm/out")]


def test_a_pull_leaves_alone_what_another_one_is_writing_without_the_lock(
    server: FakeHub, tiny_bundle
) -> None:
    server.publish_folder(tiny_bundle)
    folder = hub.parse_reference("hf://owner/tiny").folder
    written, left = folder / "refs" / ".main.other.tmp", folder / "snapshots" / ".killed.tmp"
    for path in (written, left / "card.yaml"):
        path.parent.mkdir(parents=True)
        path.write_text("half")
    hub.pull("hf://owner/tiny")
    assert written.exists() and not left.exists()
