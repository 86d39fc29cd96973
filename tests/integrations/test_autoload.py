"""Zero-code activation: "paged" works without ``import hf_paged``; its errors break no other import."""

import pytest

from support import zoo
from support.installed import install, run

# How programs come to their model class: torch may be imported first, or from within transformers' own modules.
WAYS = {
    "torch first": "import torch\nfrom transformers import AutoModelForCausalLM as Model",
    "the base class": "from transformers import PreTrainedModel\nfrom transformers import LlamaForCausalLM as Model",
    "explicit too": "from transformers import LlamaForCausalLM as Model\nimport hf_paged",
}
GENERATE = """
import sys, torch
assert OPTIONAL or "hf_paged" not in sys.modules
dense, paged = (Model.from_pretrained(FOLDER, attn_implementation=name) for name in ("sdpa", "paged"))
ids = torch.arange(3, 40).reshape(1, -1)
expected, got = (model.generate(ids, max_new_tokens=12, pad_token_id=0) for model in (dense, paged))
assert torch.equal(expected, got), (expected, got)
import hf_paged
counted = hf_paged.stats(paged)
print(counted.page_reads > 0, counted.packed_calls, sum(counted.gathers.values()), counted.fallbacks)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the installed package's metadata."""
    return install(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    zoo.pair("llama")[0].save_pretrained(folder)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_paged_without_an_import(way, installed, folder):
    names = f"FOLDER, OPTIONAL = {str(folder)!r}, {way == 'explicit too'}\n"
    done = run(WAYS[way] + "\n" + names + GENERATE, installed)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True 1 0 {}\n"


@pytest.mark.slow
def test_switched_off(installed, folder):
    done = run(ASK.format(folder=str(folder)), installed, HF_PAGED_AUTOLOAD="0")
    assert done.stdout.startswith('ValueError Specified `attn_implementation="paged"` is not supported.'), done.stderr


# Loads a dense model, then asks for "paged"; says how that fails.
ASK = """
import torch, warnings
warnings.simplefilter("error")
from transformers import LlamaForCausalLM
model = LlamaForCausalLM.from_pretrained({folder!r}, attn_implementation="sdpa")
for _ in range(2):
    try:
        model.set_attn_implementation("paged")
    except Exception as error:
        said = type(error).__name__ + " " + str(error)
print(said, end="")
"""


def write(folder, **files):
    for name, text in files.items():
        path = folder / (name.replace("__dot__", ".").replace("__in__", "/"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.slow
def test_a_package_that_cannot_be_imported(installed, folder, tmp_path):
    broken = write(tmp_path, hf_paged__dot__py="raise OSError('half of it is missing')")
    done = run(ASK.format(folder=str(folder)), broken, installed)
    assert done.stdout == (
        'ImportError attn_implementation="paged" is that of hf_paged, which cannot be imported here: '
        'OSError: half of it is missing. `hf-paged doctor` says more; "sdpa" and "eager" work without it'
    ), done.stderr


@pytest.mark.slow
def test_a_transformers_that_is_too_old(installed, folder, tmp_path):
    other = tmp_path / "transformers-4.57.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.57.0\n")
    done = run(ASK.format(folder=str(folder)), tmp_path, installed)
    assert done.stdout.startswith('ImportError attn_implementation="paged" is that of hf_paged, which cannot be'), done
    assert "PagedError: hf_paged needs transformers>=5.17, and 4.57.0 is installed: pip install" in done.stdout


NEWER = """
import sys, torch
from transformers import LlamaForCausalLM
with torch.inference_mode():
    model = LlamaForCausalLM.from_pretrained({folder!r}, attn_implementation="paged")
    for _ in range(2):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
stats = sys.modules["hf_paged"].stats(model)
print(stats.packed_calls, stats.fallbacks)
"""


@pytest.mark.slow
def test_a_transformers_that_is_newer_than_those_tested(installed, folder, tmp_path):
    """It is met while a model is built, and checked before the first call."""
    other = tmp_path / "transformers-9.0.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 9.0.0\n")
    done = run(NEWER.format(folder=str(folder)), tmp_path, installed)
    assert done.stdout == "2 {}\n", done.stderr
    assert done.stderr.count("transformers 9.0.0 is newer than those that hf_paged was tested with") == 1


def test_no_transformers(installed, tmp_path):
    missing = write(tmp_path, transformers__dot__py="raise ModuleNotFoundError(\"No module named 'transformers'\")")
    done = run("import sys, torch\nprint(torch.ones(2).sum(), len(sys.meta_path) > 3)", missing, installed)
    assert (done.stdout, done.stderr) == ("tensor(2.) True\n", "")


# From here on a small package stands for transformers, and the entry point is called by hand: torch takes seconds.
START = "import sys, hf_paged_autoload\n"
CHECK = """
class PreTrainedModel:
    def get_correct_attn_implementation(self, requested_attention, is_init_check=False):
        return "checked " + requested_attention
"""
# Registers by wrapping, as hf_paged does.
PACKAGE = """
from transformers.modeling_utils import PreTrainedModel
check = PreTrainedModel.get_correct_attn_implementation
PreTrainedModel.get_correct_attn_implementation = lambda self, *args: "paged, " + check(self, *args)
"""


def fake(folder, modeling: str, package: str = PACKAGE):
    return write(
        folder,
        transformers__in____init____dot__py="",
        transformers__in__modeling_utils__dot__py=modeling,
        hf_paged__dot__py=package,
    )


WHEN = {
    "before transformers": ("hf_paged_autoload.install()\n", CHECK),
    "from within it": ("", "import hf_paged_autoload\nhf_paged_autoload.install()\n" + CHECK),
    "after it": ("import transformers.modeling_utils\nhf_paged_autoload.install()\n", CHECK),
}
ASK_CHECK = """
finders = len(sys.meta_path)
from transformers.modeling_utils import PreTrainedModel
ask = PreTrainedModel().get_correct_attn_implementation
print(ask("sdpa"), "hf_paged" in sys.modules, len(sys.meta_path), type(sys.modules["transformers.modeling_utils"]))
print(ask("paged"), "hf_paged" in sys.modules)
print(PreTrainedModel().get_correct_attn_implementation("paged", True))
"""


@pytest.mark.parametrize("when", WHEN)
def test_it_waits_for_the_word(when, tmp_path):
    """hf_paged is imported when it is asked for, once; the import system is as it was by then."""
    start, modeling = WHEN[when]
    done = run("import sys\nfinders = len(sys.meta_path)\n" + START + start + ASK_CHECK, fake(tmp_path, modeling))
    first, *others = done.stdout.splitlines()
    assert first.startswith("checked sdpa False ") and first.endswith(" <class 'module'>"), done.stderr
    assert others == ["paged, checked paged True", "paged, checked paged"]
    plain = run("import sys\nprint(len(sys.meta_path))")
    assert first.split()[3] == plain.stdout.strip()


def test_transformers_that_fails_at_first(tmp_path):
    """The second import of what raised at the first is followed, too."""
    package = fake(tmp_path, "import os\nif os.environ.pop('FAILS', None): raise OSError\n" + CHECK)
    again = "try: import transformers.modeling_utils\nexcept OSError: print('failed')\n"
    done = run(START + "hf_paged_autoload.install()\n" + again + ASK_CHECK, package, FAILS="1")
    assert done.stdout.splitlines()[0] == "failed" and "paged, checked paged True" in done.stdout, done.stderr


HOSTILE = {
    "another transformers": ("", "class PreTrainedModel: pass\n", "AttributeError: type object 'PreTrainedModel'"),
    "no class at all": ("", "", "has no attribute 'PreTrainedModel'"),
    "a locked loader": (
        "import importlib.machinery, importlib.util\n"
        "class Loader(importlib.machinery.SourceFileLoader):\n"
        "    def __setattr__(self, name, value):\n"
        "        super().__setattr__(name, value) if name != 'exec_module' else 1 / 0\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'transformers.modeling_utils':\n"
        "            return importlib.util.spec_from_loader(name, Loader(name, path[0] + '/modeling_utils.py'))\n"
        "sys.meta_path.insert(0, Finder())\n",
        CHECK,
        "ZeroDivisionError",
    ),
}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_it_never_breaks_an_import(hostile, tmp_path):
    """One warning, no more; not even that where warnings are errors."""
    before, modeling, words = HOSTILE[hostile]
    code = START + before + "hf_paged_autoload.install()\nimport transformers.modeling_utils\nprint('imported')"
    package = fake(tmp_path, modeling)
    done = run(code, package)
    assert done.stdout == "imported\n", done.stderr
    assert done.stderr.count("does not work without `import hf_paged` here, ") == 1 and words in done.stderr
    strict = run(code, package, PYTHONWARNINGS="error")
    assert (strict.stdout, strict.stderr) == ("imported\n", "")
