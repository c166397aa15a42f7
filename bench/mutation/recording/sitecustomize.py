"""Found by Python processes that a recorded test starts: what they run is recorded too."""

import os

from recorder import Recorder, WrittenLines

if "MUTATION_LINES" in os.environ:
    Recorder(tuple(os.environ["MUTATION_ROOTS"].split(os.pathsep)), WrittenLines(os.environ["MUTATION_LINES"])).start()
