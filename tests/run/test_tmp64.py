import pytest, torch
from run.test_state_runs import *
from states.state_families import in_double
@pytest.mark.parametrize("fam", ["falcon_h1","qwen3_5_text"])
def test_x(fam, folder, overrides, monkeypatch):
    from trietune.device import precision
    more = {"lora_target_modules": ["q_proj", "in_proj", "gate_proj"]} if fam == "falcon_h1" else {}
    path = folder(fam)
    def both(tag):
        out=[]
        for b in ("trie","padded"):
            out.append(weights_of(train(settings_of(overrides, path, wandb_run_name=tag+b, batching=b, gradient_checkpointing=True, **more), tracker=Heard().tracker)))
        return out
    def diff(a,b): return max(float((a[k].double()-b[k].double()).norm()/(1e-3+b[k].double().norm())) for k in b)
    s=both("s")
    monkeypatch.setitem(precision.DTYPES, "float32", torch.float64)
    with in_double(): d=both("d")
    print(fam, "fp32 trie-padded %.1e fp64 trie-padded %.1e; trie fp32-fp64 %.1e padded %.1e"%(diff(*s),diff(*d),diff(s[0],d[0]),diff(s[1],d[1])), d[0][next(iter(d[0]))].dtype)
