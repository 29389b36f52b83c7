import qpref


def test_smoke(make_recipe, tmp_path):
    out = qpref.train(make_recipe(), output=tmp_path / "run")
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
