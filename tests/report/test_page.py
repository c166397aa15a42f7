"""The report: one file that needs nothing else, and that a browser shows as meant."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
from html import unescape

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from tempsamp_fast.report.__main__ import main
from tempsamp_fast.report.plots import COLOURS

QUERY = "the <b>red</b> square & the circle"


def write_run(folder, shaping, seed, video, span):
    """A run of two steps, evaluated before and after on two queries, one of them about a missing video."""
    config = {"data": {"task": "grounding"}, "model": {"model": "tiny"}, "algorithm": {"shaping": shaping}}
    config |= {"train": {"seed": seed, "phases": "p"}}
    rewards = {"reward/tiou": 0.4, "reward/on_policy_mean": 0.4, "reward/off_policy_mean": 1.0, "loss": 0.5}
    metrics = [{"step": 0, "phase": "eval", "eval/answer/miou": 0.1}]
    speeds = [
        {"time/step_s": second, "time/rollout_s": 0.25, "perf/tokens_per_s": 1000.0, "batch/tree_saving": 1.5}
        for second in (1.0, 2.0, 2.0, 9.0)
    ]
    metrics += [{"step": step, "phase": "tempsamp/answer", **rewards, **speed} for step, speed in enumerate(speeds)]
    metrics += [{"step": 4, "phase": "eval", "eval/answer/miou": 0.5}]
    group = {"rewards": {"tiou": [0.2, 0.6, 1.0]}, "advantages": [-1, 0, 1], "is_off_policy": [False, False, True]}
    groups = [{"step": step, "phase": "tempsamp/answer", **group} for step in range(4)]
    answer = {"query": QUERY, "duration_s": 4.0, "windows": [[1.0, 3.0]], "text": ""}
    answers = [
        {**answer, "sample_id": "a", "video": str(video), "span": span, "iou": 0.5},
        {**answer, "sample_id": "b", "video": str(folder / "gone.mp4"), "span": None, "iou": 0.0},
    ]
    (folder / "eval").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    constant = {"stage": "constant 1.0-3.0 s", "mode": "-", "miou": 0.125, "r1@0.5": 0.0}
    (folder / "summary.json").write_text(json.dumps({"num_queries": 2, "rows": [{"mode": "answer"}, constant]}))
    files = {"metrics": metrics, "groups": groups, "eval/start_answer": answers, "eval/1_tempsamp_answer": answers}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report on two methods, each with two seeds."""
    folder = tmp_path_factory.mktemp("report")
    video = folder / "video.mp4"
    source = ["-f", "lavfi", "-i", "color=c=0x2060a0:duration=4:size=64x48:rate=10"]
    subprocess.run(["ffmpeg", "-v", "error", *source, "-pix_fmt", "yuv420p", str(video)], check=True)
    runs = []
    for shaping, span in (("mixed", [0.0, 2.0]), ("anchor", [2.0, 4.0])):
        for seed in (0, 1):
            runs.append(str(folder / f"{shaping}-{seed}"))
            write_run(folder / f"{shaping}-{seed}", shaping, seed, video, span)
    main([*runs, "--out", str(folder / "page.html")])
    return folder / "page.html"


def test_page_loads_nothing_from_elsewhere(page):
    html = page.read_text()
    sources = re.findall(r"""(?:src|href)=["']([^"']*)""", html)
    assert sources and all(source.startswith(("data:", "#answers-")) for source in sources)
    assert html.count("<script") == 2 and "url(" not in html and "@import" not in html
    (policy,) = re.findall(r'Content-Security-Policy" content="(.*?)"', html)
    script = html.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_page_has_every_section_and_escapes_what_it_shows(page):
    html = page.read_text()
    titles = ["Runs", "Scores", "Answers", "Gallery", "Speed", "Curves", "Distributions"]
    assert re.findall(r"<h2>(.*?)</h2>", html) == titles
    assert html.count("<figure>") == 4 and html.count("<article") == 2 and html.count("<article class=plays") == 1
    assert "&lt;b&gt;red&lt;/b&gt;" in html and "<b>red" not in html
    assert "anchor-*" in html and "shaping=anchor" in html and "25.0 ± 0.0" in html


def test_the_page_carries_its_curves_and_every_answer(page):
    data = carried(page.read_text())
    assert [method["label"] for method in data["methods"]] == ["mixed-*", "anchor-*"]
    titles = [chart["title"] for chart in data["charts"]]
    assert titles[:2] == ["mean sampled task reward (running mean)", "held-out mIoU, answer mode [%]"]
    first = data["charts"][1]["lines"][0]
    assert first == {"method": 0, "run": "mixed-0", "x": [0, 4], "y": [10.0, 50.0]}
    assert data["samples"][0] == [QUERY, "video.mp4", [[1.0, 3.0]]]
    assert data["answers"]["answer"][3] == {
        "method": 1, "run": "anchor-1", "rows": [[2.0, 4.0, 0.5], [None, None, 0.0]]
    }  # fmt: skip


def test_each_score_leads_to_its_answers_and_gains_come_first(page):
    table = page.read_text().partition("<h2>Scores</h2>")[2].partition("</table>")[0]
    header, first, second, constant = [re.findall("<t[hd]>(.*?)</t", line) for line in table.split("</tr>")[:-1]]
    assert header[:4] == ["method", "mode", "miou over mixed-*, points", "miou"] and header[-1] == "seeds"
    assert first[2:4] == ["-", '<a href="#answers-answer-0">25.0 ± 0.0</a>'] and second[2] == "0.0 ± 0.0"
    assert constant[:4] == ["constant 1.0-3.0 s", "-", "-", "12.5"] and constant[header.index("r1@0.5")] == "0.0"
    assert "2 held-out queries." in page.read_text()


def test_what_a_page_carries_cannot_end_its_script(tmp_path):
    write_run(tmp_path / "run", "mixed", 0, tmp_path / "</script><b>.mp4", [0.0, 2.0])
    main([str(tmp_path / "run")])
    html = (tmp_path / "run/report.html").read_text()
    assert html.count("</script>") == 2 and carried(html)["samples"][0][1] == "script><b>.mp4"


def test_many_runs_keep_the_page_small(tmp_path):
    folders = [tmp_path / f"run-{seed}" for seed in range(8)]
    for seed, folder in enumerate(folders):
        write_run(folder, "mixed", seed, tmp_path / "gone.mp4", [0.0, 2.0])
        rows = [{"step": step, "phase": "p", "loss": step / 7, "policy/entropy": 1 / 3} for step in range(20_000)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main([*map(str, folders)])
    assert (folders[0] / "report.html").stat().st_size < 600_000


def carried(html):
    return json.loads(html.partition('id="data">')[2].partition("</script>")[0])


def test_the_page_tells_the_median_time_of_each_part_of_a_step_and_what_trees_save(page):
    table = page.read_text().partition("<h2>Speed</h2>")[2].partition("</table>")[0]
    header, *rows = [re.findall("<t[hd]>(.*?)</t", line) for line in table.split("</tr>")[:-1]]
    assert header == ["folder", "phase", "step_s", "rollout_s", "tokens_per_s", "tree_saving"]
    assert rows[0] == ["mixed-0", "tempsamp/answer", "2.000", "0.250", "1,000", "1.500"] and len(rows) == 4


def test_a_missing_video_is_said_in_its_place(page):
    assert re.search(r'class="missing">no frames: .*gone\.mp4', page.read_text())


def write_config(folder, task):
    config = {"data": {"task": task}, "model": {"model": "m"}, "train": {"seed": 0, "phases": "p"}}
    (folder / "config.json").write_text(json.dumps(config))


def test_highlight_detection_shows_its_scores_and_why_no_gallery(tmp_path):
    write_config(tmp_path, task="highlight")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "phase": "eval", "eval/answer/hl_map": 0.25}\n')
    (tmp_path / "eval").mkdir()
    answer = {"sample_id": "a", "query": QUERY, "video": "gone.mp4", "duration_s": 4.0, "windows": [[1.0, 3.0]]}
    (tmp_path / "eval/start_answer.jsonl").write_text(json.dumps({**answer, "text": "", "span": None, "iou": 0.0}))
    main([str(tmp_path)])
    html = (tmp_path / "report.html").read_text()
    assert "<th>hl_map</th>" in html and "<td>25.0</td>" in html and "miou" not in html.partition("<script>")[0]
    assert "Left out: the answers of highlight detection" in html and "<article" not in html and "racle" not in html


def test_a_run_without_groups_and_evaluations_still_has_a_page_of_curves(tmp_path):
    write_config(tmp_path, task="grounding")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "phase": "sft/answer", "loss": 1.0}\n')
    main([str(tmp_path)])
    html = (tmp_path / "report.html").read_text()
    assert re.findall(r"<h2>(.*?)</h2>", html) == ["Runs", "Curves"]


def test_command_line_names_a_folder_without_a_run(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "nothing")])
    assert "not a run folder" in capsys.readouterr().err


def find_browser():
    """A Chromium on the PATH; without one skips, or fails where TEMPSAMP_REQUIRE_BROWSER=1."""
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is not None:
        return browser
    if os.environ.get("TEMPSAMP_REQUIRE_BROWSER") == "1":
        pytest.fail(f"TEMPSAMP_REQUIRE_BROWSER=1, but none of {', '.join(names)} is on the PATH")
    pytest.skip("no Chromium on the PATH to look at the page with")


def test_without_a_browser_the_test_skips_unless_one_is_required(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("TEMPSAMP_REQUIRE_BROWSER", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no Chromium"):
        find_browser()
    monkeypatch.setenv("TEMPSAMP_REQUIRE_BROWSER", "1")
    with pytest.raises(pytest.fail.Exception, match="none of chromium-headless-shell, chromium"):
        find_browser()


def in_browser(page, folder, *options):
    """What Chromium prints of the page."""
    command = [find_browser(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder}", *options]
    return subprocess.run([*command, page], check=True, capture_output=True, timeout=120, text=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize("width", [1300, 400])
def test_a_browser_draws_zooms_plays_and_lists_answers(page, tmp_path, width):
    """A copy of the page that uses itself, and says into its title what it saw."""
    use = """<script>
      const plot = document.querySelector(".plot"), box = plot.getBoundingClientRect(), seen = {};
      const at = (share) => ({ clientX: box.left + share * box.width });
      const point = (kind, share) => plot.dispatchEvent(new PointerEvent(kind, at(share)));
      const steps = () => [...plot.querySelectorAll("text[text-anchor=middle]")].map((text) => +text.textContent);
      seen.lines = document.querySelectorAll(".chart").length && plot.querySelectorAll("polyline").length;
      point("pointermove", 0.5);
      seen.tip = document.querySelector(".tip").textContent;
      seen.range = Math.max(...steps());
      point("pointerdown", 0.2); point("pointerup", 0.6);
      seen.zoomed = Math.max(...steps());
      plot.dispatchEvent(new Event("dblclick"));
      seen.back = Math.max(...steps());
      document.querySelector("#legend input").click();
      seen.left = plot.querySelectorAll("polyline").length;
      const slider = document.querySelector("article.plays input");
      slider.value = 500; slider.dispatchEvent(new Event("input"));
      seen.time = document.querySelector("article.plays output").textContent;
      seen.frame = document.querySelector(".screen img").src.startsWith("data:image/jpeg");
      seen.now = document.querySelector("article.plays .now").style.left;
      seen.answers = [...document.querySelectorAll("#answers td")].map((cell) => cell.textContent);
      seen.overflow = document.documentElement.scrollWidth - innerWidth;
      document.title = JSON.stringify(seen);
    </script></body>"""
    copy = tmp_path / "copy.html"
    html = re.sub('<meta http-equiv="Content-Security-Policy".*?>', "", page.read_text())
    copy.write_text(html.replace("</body>", use))
    dom = in_browser(f"{copy.as_uri()}#answers-answer-1", tmp_path, f"--window-size={width},2000", "--dump-dom")
    seen = json.loads(unescape(re.findall("<title>(.*?)</title>", dom)[0]))
    assert re.fullmatch(r"step [12] mixed-\*: 0.4 \(0.4 to 0.4\) anchor-\*: 0.4 \(0.4 to 0.4\)", seen.pop("tip"))
    assert seen.pop("answers") == [
        *(QUERY, "gone.mp4", "1.00 to 3.00", "no answer", "no answer", "0", "0"),
        *(QUERY, "video.mp4", "1.00 to 3.00", "2.00 to 4.00", "2.00 to 4.00", "50", "50"),
    ]
    assert seen.pop("zoomed") < seen.pop("range") == seen.pop("back")
    assert seen.pop("overflow") <= 0
    assert seen == {"lines": 4, "left": 2, "time": "2.0 s", "frame": True, "now": "50%"}


@pytest.mark.slow
def test_a_browser_obeys_the_pages_policy_and_still_draws(page, tmp_path):
    assert in_browser(page.as_uri(), tmp_path, "--dump-dom").count("<polyline") == 12


@pytest.mark.slow
def test_a_browser_shows_spans_where_they_are_on_the_frames(page, tmp_path):
    """Each method's bar covers half the frames' width: the first method the left half, the second the right one."""
    shot = tmp_path / "shot.png"
    in_browser(page.as_uri(), tmp_path, "--window-size=1280,2400", f"--screenshot={shot}")
    picture = imread(shot)[..., :3]
    is_frame = _has(picture, (0x20 / 255, 0x60 / 255, 0xA0 / 255), tolerance=0.05)
    first_row = np.flatnonzero(is_frame.sum(axis=1) > 300)[0]
    frames = _columns(is_frame[first_row:])
    left, right = (_columns(_has(picture[first_row:], to_rgb(colour), tolerance=0.01)) for colour in COLOURS[:2])
    middle = sum(frames) / 2
    assert left == pytest.approx((frames[0], middle), abs=4)
    assert right == pytest.approx((middle, frames[1]), abs=4)


def _has(picture, colour, tolerance):
    """[height, width] bool: where the picture has the colour."""
    return abs(picture - np.array(colour)).max(axis=2) <= tolerance


def _columns(where):
    """First column, and the one after the last, with at least 20 such pixels."""
    columns = np.flatnonzero(where.sum(axis=0) >= 20)
    return columns[0], columns[-1] + 1
