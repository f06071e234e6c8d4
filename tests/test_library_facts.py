"""What comments here say of a library, looked up in the version that is installed: a new one that says otherwise shows."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest

#: Module, name in it, what its text has (blanks do not count), and where it is said here.
FACTS = [
    ("transformers.trainer", "Trainer._run_epoch", "not self.args.ignore_data_skip", "settings/arguments.py"),
    ("transformers.trainer", "Trainer._run_epoch", "skip_first_batches(train_dataloader", "settings/arguments.py"),
    ("transformers.training_args", "TrainingArguments.train_batch_size", "* max(1, self.n_gpu)", "devices.py"),
    ("transformers.trainer", "Trainer._get_num_items_in_batch", "self.model_accepts_loss_kwargs", "model/presets.py"),
    ("transformers.modeling_utils", "PreTrainedModel.warn_if_padding_and_no_attention_mask",
     "self.config.pad_token_id is None", "model/presets.py"),
    ("huggingface_hub.hf_file_system", "HfFileSystem.info", "self.ls(parent_path", "corpus/hub_files.py"),
    ("torch.utils.data.dataloader", "_BaseDataLoaderIter.__init__", "self._base_seed", "training/trainer.py"),
    ("accelerate.commands.launch", "simple_launcher", "process.wait()", "training/signals.py"),
    ("accelerate.accelerator", "Accelerator.__init__", 'self.device.type != "cpu"', "training/loss_scale.py"),
    ("torch.optim.adam", "_fused_adam", "found_inf", "training/update.py"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "name", "text", "said"), FACTS)
def test_a_fact_that_a_comment_stands_on(module, name, text, said):
    found = importlib.import_module(module)
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
    source = inspect.getsource(found.fget if isinstance(found, property) else found)
    assert re.sub(r"\s", "", text) in re.sub(r"\s", "", source), f"{name} has changed: look at slimpajama_hf/{said}"


def test_no_comment_names_a_line_of_a_library():
    from tests.test_imports import PACKAGE, modules

    for path in modules():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\blines? \d{2,}", text), path.relative_to(PACKAGE)
