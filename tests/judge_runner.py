"""Judges in processes of their own, to be killed: forks one for each cache it is told of.

Started with a server's address; for each line (a cache and where to write the result) it forks a
child that judges, and writes the child's process id.
"""

import json
import os
import sys
from pathlib import Path

import openai

from pvcore.judge import judge_all
from pvcore.judge_api import ApiJudge

N_PAIRS, CONCURRENCY = 12, 3


def judge(base_url: str, cache: str, result: str) -> None:
    openai._base_client.INITIAL_RETRY_DELAY = 0.0
    judge = ApiJudge(
        "judge-1", base_url=base_url, api_key="none", cache=cache, concurrency=CONCURRENCY
    )
    pairs = [(f"question {index}", f"answer {index}") for index in range(N_PAIRS)]
    scores = judge_all(judge, "evil", pairs)
    content = [scores.trait_scores, scores.coherence_scores, scores.counts]
    Path(result).write_text(json.dumps(content), "utf-8")


def main() -> None:
    child = 0
    for line in sys.stdin:
        if child:
            os.waitpid(child, 0)
        cache, result = line.rstrip("\n").split("\t")
        child = os.fork()
        if child == 0:
            try:
                judge(sys.argv[1], cache, result)
            finally:
                os._exit(0)
        print(child, flush=True)
        # Reaped at the next line: until then its id cannot belong to another process.
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        print("ended", flush=True)


if __name__ == "__main__":
    main()
