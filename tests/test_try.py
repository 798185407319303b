import time, harness
def test_try(tiny, tmp_path):
    for kw in (dict(), dict(deepspeed=True), dict(ranks=2), dict(ranks=2, deepspeed=True)):
        for stage in harness.STAGES:
            t = time.time()
            w = tmp_path/f"w{len(kw)}{kw.get('ranks')}"
            out = harness.finish(stage, w, prepare=harness.note_changes(w, tmp_path/f"n{stage}"), **kw)
            print(kw, stage, round(time.time() - t, 2))
            if not kw: print(out[-1500:])
            print(len(open(tmp_path/f"n{stage}").read().splitlines()))
    print(open(tmp_path/f"nproxy").read()[-9000:])
