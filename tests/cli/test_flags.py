"""Flags as people type them for other engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from tern.cli import app, help_pages, main
from tern.cli.flags import IGNORED_FLAGS, check_parallelism, check_parser, names_in, with_dashes, without_ignored
from tern.errors import OptionError
from tern.server import ServerOptions

ROOT = Path(__file__).parent.parent.parent


def test_underscores_become_dashes_in_flags_only() -> None:
    given = ["serve", "--load_choices", "default_v1", "--max_model_len=1_0", "my_model", "--", "--kept_so"]
    assert with_dashes(given) == [
        "serve",
        "--load-choices",
        "default_v1",
        "--max-model-len=1_0",
        "my_model",
        "--",
        "--kept_so",
    ]


def test_flags_of_other_process_layouts_are_taken_out_with_their_values() -> None:
    given = [
        "serve",
        "M",
        "--engine-worker-queue-port",
        "8182",
        "--trust-remote-code",
        "--load-choices=default_v1",
        "--port",
        "1",
    ]
    kept, ignored = without_ignored(given)
    assert kept == ["serve", "M", "--port", "1"]
    assert ignored == ["--engine-worker-queue-port", "--trust-remote-code", "--load-choices"]


def test_an_ignored_flag_without_its_value_is_refused() -> None:
    with pytest.raises(OptionError, match="--load-choices needs a value"):
        without_ignored(["serve", "--load-choices"])


def test_no_ignored_flag_shadows_an_option_that_does_something() -> None:
    help_text = help_pages.render()
    assert [flag.name for flag in IGNORED_FLAGS if f"  {flag.name} " in help_text] == []


@pytest.mark.parametrize("size", ["nan", "inf", "-1", "0"])
def test_a_cache_of_no_size_is_refused_as_it_was_typed(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--kv-cache-memory", size])
    assert ended.value.code == 2
    assert f"--kv-cache-memory is {size}: it must be a number of GiB" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ernie_x1", "ernie-x1", "ernie45", None])
def test_this_models_parser_names(name: str | None) -> None:
    check_parser("--reasoning-parser", name)


def test_another_models_parser_is_refused_with_the_names() -> None:
    with pytest.raises(OptionError, match=r"--tool-call-parser is 'hermes'.*ernie_x1"):
        check_parser("--tool-call-parser", "hermes")


def test_names_one_by_one_and_as_json() -> None:
    assert names_in("--allowed-hosts", None) == ()
    assert names_in("--allowed-hosts", ["a", '["b", "a"]', "[]"]) == ("a", "b")


def test_more_than_one_device_is_refused() -> None:
    check_parallelism("--tensor-parallel-size", 1)
    with pytest.raises(OptionError, match="--tensor-parallel-size is 4"):
        check_parallelism("--tensor-parallel-size", 4)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["serve", "--max-modle-len", "8"], 2, "--max-modle-len"),
        (["serve", "--tensor_parallel_size", "2"], 2, "--tensor-parallel-size is 2"),
        (["serve", "A", "--model", "B"], 2, "named twice"),
        (["serve", "--log-level", "loud"], 2, "--log-level is 'loud'"),
        (["serve", "--log-format", "xml"], 2, "--log-format is 'xml'"),
        (["serve", "--api-key-file", "/nowhere/keys"], 2, "--api-key-file /nowhere/keys cannot be read"),
        (["serve", "--allowed-origins", "[5]"], 2, "--allowed-origins is '[5]'"),
        (["serve", "--allowed-origins", '["example.com"]'], 2, "allowed_origins has 'example.com'"),
        (["serve", "--allow-credentials", "--allowed-origins", "*"], 2, "without *"),
        (["serve", "--allowed-hosts", "Example.com:80"], 2, "allowed_hosts has"),
        (["serve", "--max-connections", "0"], 2, "max_connections is 0"),
        (["serve", "--max-log-len", "5"], 2, "max_log_len is 5"),
        (["serve", "--otlp-traces-endpoint", "localhost:4317"], 2, "otlp_traces_endpoint is"),
        (["generate", ""], 2, "no prompt"),
        (["generate", "a", "--kv-cache-dir", "/dev/null"], 2, "kv_cache_dir is '/dev/null'"),
        (["chat", "--kv-cache-dir-size", "0"], 2, "--kv-cache-dir-size is 0: it must be a number of GB above 0"),
        (["serve", "--kv-cache-dir-size", "1"], 2, "there is no kv_cache_dir"),
        (["fly"], 2, "fly"),
        (["--help"], 0, "Usage: tern"),
        (["--version"], 0, "tern 0.1.0"),
    ],
)
def test_wrong_usage_exits_with_2_and_names_the_matter(
    arguments: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    output = capsys.readouterr()
    assert exit_.value.code == status
    assert said in output.out + output.err


def test_each_help_fits_a_screen() -> None:
    pages = help_pages.render().split("```text\n")[1:]
    assert len(pages) == 1 + len(app.registered_commands) + 1, "the last is serve --help-all, as long as it gets"
    assert [len(page.splitlines()) for page in pages[:-1] if len(page.splitlines()) > 60] == []


def test_the_documented_help_is_current() -> None:
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == help_pages.render(), "run `make docs`"


@pytest.mark.parametrize(("flags", "dropped"), [([], True), (["--keep-volatile-lines"], False)])
def test_volatile_lines_are_dropped_unless_kept(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], dropped: bool
) -> None:
    given: list[ServerOptions] = []
    monkeypatch.setattr("tern.server.run_server", lambda _, options, **__: given.append(options))
    with pytest.raises(SystemExit):
        main(["serve", *flags])
    assert [options.drop_volatile_lines for options in given] == [dropped]
