"""What a checkpoint from a stranger may do: nothing but be read. And what the source itself must never do."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tern
from tern.chat import ChatTemplate
from tern.chat.template import MAX_TEMPLATE_LENGTH
from tern.checkpoint import load_model, resolve_model
from tern.errors import CheckpointError, InvalidRequestError

PACKAGE = Path(tern.__file__).parent
EMBEDDED = PACKAGE / "embedded" / "tiny"
USER = [{"role": "user", "content": "hi"}]

FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "zmq", "multiprocessing", "xmlrpc", "yaml"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "system", "popen", "Popen"}
HTTP_CLIENTS = {"httpx", "requests", "aiohttp", "huggingface_hub", "urllib3", "ftplib"}


def nodes_of(*rooms: str) -> Iterator[tuple[Path, ast.AST]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        if not rooms or path.relative_to(PACKAGE).parts[0].removesuffix(".py") in rooms:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                yield path, node


def imports(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def test_nothing_is_unpickled_and_no_process_is_talked_to() -> None:
    """Pickles over sockets, and code made of text: there is no place in the source where either could happen."""
    for path, node in nodes_of():
        assert not {name.split(".")[0] for name in imports(node)} & FORBIDDEN_MODULES, path
        if isinstance(node, ast.Call):
            called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            owner = getattr(getattr(node.func, "value", None), "id", "")
            assert called not in FORBIDDEN_CALLS or owner == "re", f"{path}:{node.lineno} calls {called}"
            assert (owner, called) not in {("torch", "load"), ("np", "load"), ("joblib", "load")}, path
            assert "trust_remote_code" not in {keyword.arg for keyword in node.keywords}, path


def test_what_serves_requests_has_no_http_client() -> None:
    """Server-side requests: server, chat and engine could not fetch a URL if they wanted to."""
    for path, node in nodes_of("server", "chat", "engine", "model", "ops"):
        found = {name.split(".")[0] for name in imports(node)} & HTTP_CLIENTS
        assert not found, path
        assert "urllib.request" not in imports(node), path


WATCHED = """
import sys
import tern.engine.engine, tern.chat, tern.checkpoint.loader
from tern.chat import ChatProtocol
from tern.checkpoint import load_model, resolve_model
resolve_model(None); load_model(resolve_model(None), progress=False)  # what is imported late is imported now
ChatProtocol.from_directory(resolve_model(None).directory).prompt([{"role": "user", "content": "hi"}])
def watch(event, args):
    if event == "open" and (isinstance(args[1], str) and set(args[1]) & set("wax+")):
        print("writes", args[0])
    if event.split(".")[0] in ("subprocess", "socket", "pty", "ctypes", "shutil", "tempfile") or event in (
        "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.rename", "os.mkdir", "os.rmdir",
        "os.symlink", "os.link", "os.chmod", "exec", "compile", "import", "marshal.loads", "pickle.find_class"):
        if event == "import" and not str(args[0]).startswith("evil"):
            return
        if event in ("exec", "compile") and "template" in str(args):
            return  # jinja compiles templates to code of its own
        print(event, args[:2])
sys.addaudithook(watch)
source = resolve_model(sys.argv[1])
load_model(source, progress=False)
protocol = ChatProtocol.from_directory(source.directory, source.text_files)
print(protocol.prompt([{"role": "user", "content": "hi"}]).token_ids[:1])
"""


def hostile(tmp_path: Path) -> Path:
    """The embedded model, with all that other loaders run."""
    directory = tmp_path / "hostile"
    shutil.copytree(EMBEDDED, directory)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config |= {"auto_map": {"AutoModelForCausalLM": "evil_model.Evil", "AutoConfig": "evil_model.Evil"}}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    path = directory / "tokenizer_config.json"
    tokens = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    tokens |= {"auto_map": {"AutoTokenizer": ["evil_tokenizer.Evil", None]}, "tokenizer_class": "Evil"}
    path.write_text(json.dumps(tokens), encoding="utf-8")
    run = f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: pass\n"
    for name in ("evil_model.py", "evil_tokenizer.py", "__init__.py", "setup.py", "sitecustomize.py", "conftest.py"):
        (directory / name).write_text(run, encoding="utf-8")
    (directory / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch ran'\ntR.")
    return directory


def test_a_checkpoint_runs_and_writes_nothing(tmp_path: Path) -> None:
    """Code from model repositories: loading weights, tokenizer and template writes nothing and starts nothing."""
    directory = hostile(tmp_path)
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(directory)],
        cwd=directory.parent, env=environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1, done.stdout
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "source",
    [
        "{% include '/etc/passwd' %}",
        "{% extends '/etc/passwd' %}",
        "{% import '/etc/passwd' as p %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ (messages | attr('__class__')).__mro__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ '{0.__class__}' | format(messages) ~ ('%s' | attr('__class__')).mro() }}",
        "{{ 'x'.format_map({}).__class__.__base__ }}",
        "{{ messages | map(attribute='__class__') | map(attribute='__mro__') | list | first | first }}",
        "{{ strftime_now.__globals__['datetime'] }}",
        "{{ (tools or messages).clear() }}",
    ],
)
def test_a_template_reaches_no_file_and_no_python(source: str) -> None:
    """Template injection by a checkpoint: ways out of a sandbox that are known from elsewhere."""
    try:
        text = ChatTemplate(source).render(USER)
    except (InvalidRequestError, CheckpointError):
        return
    assert not any(word in text for word in ("root:", "<class", "<function", "module", "uid="))


def test_a_huge_template_is_not_read_into_the_compiler(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ 1 }}" * (MAX_TEMPLATE_LENGTH // 7 + 1))
    with pytest.raises(CheckpointError, match="at most"):
        ChatTemplate.from_directory(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"])
def test_files_of_absurd_size_are_refused_before_they_are_read(tmp_path: Path, name: str) -> None:
    """Exhaustion by files: sparse ones of a terabyte, which cost their author nothing."""
    from tern.chat import ChatProtocol

    directory = tmp_path / "m"
    shutil.copytree(EMBEDDED, directory)
    with (directory / name).open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match="at most"):
        ChatProtocol.from_directory(resolve_model(str(directory)).directory)


@pytest.mark.parametrize(
    "offsets", [[0, 2**63], [2**64 - 4, 2**64], [-4, 0], [4, 0], [0, 10**30], [0.0, 4.0], ["0", "4"], [0]]
)
def test_offsets_are_checked_against_the_file(tmp_path: Path, offsets: list[object]) -> None:
    """Memory errors from model files: no offset is used before it is known to lie within the file."""
    directory = tmp_path / "m"
    shutil.copytree(EMBEDDED, directory)
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    header = json.dumps({"embed": {"dtype": "F32", "shape": [1], "data_offsets": offsets}}).encode()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(CheckpointError):
        load_model(resolve_model(str(directory)), progress=False)
