import json, pytest
from layout_runs import train, worst
from samples import tiny_config
L = ["pp2","pp2 v2","pp4","tp2 pp2","cp2 pp2","pp2 dp2","pp2 v2 zb-v","pp2 zb-h1","pp4 v2","pp2 gpipe","tp2 cp2 pp2 dp2 v2 zb-v"]
@pytest.mark.parametrize("tied",[False,True])
def test_pp(recipe_file,tmp_path,tied):
    path=recipe_file()
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(num_hidden_layers=6,tie_word_embeddings=tied)))
    import time
    fl=["--parallel.micro_batch_tokens=64","--stages.s.batch_tokens=320","--stages.s.tokens=2560"]
    one=train(path,fl,"dp1",tmp_path/"one")[0]
    for i,l in enumerate(L):
        t=time.time()
        print(l, worst(train(path,fl,l,tmp_path/str(i)),one), round(time.time()-t,1),flush=True)
