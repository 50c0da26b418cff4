"""Completion: the words that fit a place, and the script in a real bash."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from zoo.cli import COMMANDS, main
from zoo.cli.completion import SCRIPTS, candidates
from zoo.errors import ConfigError


def test_words_that_fit_a_place(capsys) -> None:
    assert candidates([""]) == list(COMMANDS)
    assert "graph/teddy-gcn-digits-g30-w80" in candidates(["show", "graph/te"])
    assert "teddy" in candidates(["sparsify", "x", "--method", "te"])
    assert candidates(["finetune", ""]) == ["graph", "diffusion", "llm", "neural3d", "vision"]
    assert "teddy" in candidates(["reproduce", "t"])
    assert "--edge-sparsity" in candidates(["sparsify", "x", "--method", "teddy", "--e"])
    assert candidates(["nonsense", ""]) == []
    assert main(["completion", "words", "comp"]) == 0 and "compare" in capsys.readouterr().out
    assert main(["completion", "--help"]) == 0 and "bash" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="takes one of bash, zsh, fish; received 'tcsh'"):
        from zoo.cli.completion import completion_command

        completion_command(["tcsh"])


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_with_the_script() -> None:
    typed = (
        'zoo() { [ "$1 $2 $3 $4" = "completion words eval gra" ] && printf "graph/a\\ngraph/b\\nllm/c"; }\n'
        f'{SCRIPTS["bash"]}\nCOMP_WORDS=(zoo eval gra) COMP_CWORD=2; _zoo; echo "${{COMPREPLY[*]}}"'
    )
    done = subprocess.run(["bash", "-c", typed], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["graph/a", "graph/b"], done.stderr
