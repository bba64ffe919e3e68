"""Changes of the adapted network of conftest.py, for the tests of FusedLinear."""

from peft import LoraConfig

from lora_kernels.check.compat.families import fill_adapters

LAYERS = ("first", "second", "third")


def layers(model):
    return [getattr(model.base_model.model, name) for name in LAYERS]


def each(change):
    return lambda model: [change(layer) for layer in layers(model) if hasattr(layer, "lora_A")]


def second_adapter(active=("default", "other"), r=3, **config):
    def prepare(model):
        model.add_adapter("other", LoraConfig(r=r, lora_alpha=5, target_modules=["first", "third"], **config))
        fill_adapters(model, seed=3)
        model.base_model.set_adapter(list(active))
        model.eval()

    return prepare


def to(dtype, *names):
    return each(lambda layer: [getattr(layer, name).to(dtype) for name in names])


def freeze(name):
    return each(lambda layer: getattr(layer, name).requires_grad_(False))


def train_base(model):
    model.base_model.model.first.base_layer.weight.requires_grad_(True)
