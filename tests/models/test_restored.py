"""A pre-training model out of its archive."""


def test_a_restored_model_keeps_a_tokenizer_file(model_config, tokenizer_model, tmp_path):
    """NeMo deletes the folder that it unpacked; the copy goes with the model, and a second save has it too."""
    import gc

    from nemo_slam.models.pretraining import SLAMPretrainingModel

    model = SLAMPretrainingModel(model_config())
    assert model.tokenizer_model == tokenizer_model
    model.save_to(str(tmp_path / "one.nemo"))
    restored = SLAMPretrainingModel.restore_from(str(tmp_path / "one.nemo"), map_location="cpu")
    copy = restored.tokenizer_model
    assert copy.read_bytes() == tokenizer_model.read_bytes()
    assert copy != tokenizer_model
    restored.save_to(str(tmp_path / "two.nemo"))
    again = SLAMPretrainingModel.restore_from(str(tmp_path / "two.nemo"), map_location="cpu")
    assert again.tokenizer_model.read_bytes() == tokenizer_model.read_bytes()
    del restored
    gc.collect()
    assert not copy.exists()
