"""Files that would have FFmpeg open other files or the network, given for videos."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tempsamp_fast.video import Geometry, Sampling, load_videos
from tempsamp_fast.video.backend import why_no_extension
from tempsamp_fast.video.loaded_ffmpeg import probed_format
from tempsamp_fast.video.result import VideoError
from tempsamp_fast.video.torchcodec_backend import FORMATS, open_decoder

SEEDS = Path(__file__).parents[1] / "video/fuzz/seeds"
MPD = (
    '<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011" type="static">'
    '<Period><AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1" width="64" height="64">'
    "<BaseURL>URL</BaseURL></Representation></AdaptationSet></Period></MPD>"
)
PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nURL\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile 'URL'\n",
    "dash": '<?xml version="1.0"?>' + MPD,
    "dash after a comment": "<!-- ‮é\x80 -->" + MPD,
    "dash after bytes": "\x01\x02\x80" + MPD,
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/1\n",
    "sdp after a comment": "é=0\nv=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    "smooth": '<?xml version="1.0"?><SmoothStreamingMedia><StreamIndex Url="URL"/></SmoothStreamingMedia>',
}


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, list[str]]]:
    """The address of a file on loopback, and what was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            """Not on stderr."""

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_address[1]}/v.mp4", asked
    running.shutdown()


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "m3u8", "mpd"])
@pytest.mark.parametrize("what", PLAYLISTS)
def test_a_playlist_opens_nothing(server: tuple[str, list[str]], tmp_path: Path, what: str, suffix: str) -> None:
    """By either backend; the network, and a video that lies beside it."""
    url, asked = server
    beside = tmp_path / "beside.mp4"
    beside.write_bytes((SEEDS / "h264.mp4").read_bytes())
    for target in (url, "beside.mp4", str(beside)):
        path = tmp_path / f"clip.{suffix}"
        path.write_text(PLAYLISTS[what].replace("URL", target), encoding="utf-8")
        with pytest.raises(VideoError, match=r"not a video file|cannot be opened"):
            open_decoder(path)
        if not why_no_extension():
            with pytest.raises(VideoError):
                load_videos([(path, Sampling())], Geometry.of_family("qwen2_5_vl"), backend="native")
    assert asked == []


@pytest.mark.parametrize("name", sorted(path.name for path in SEEDS.iterdir()))
def test_videos_are_told_by_ffmpegs_own_probe(name: str) -> None:
    head = (SEEDS / name).read_bytes()
    assert probed_format(SEEDS / name, head).split(",")[0] in FORMATS


def test_a_name_that_is_a_pattern_opens_no_sequence(tmp_path: Path) -> None:
    (tmp_path / "a1.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(64))
    path = tmp_path / "a%d.jpg"
    path.write_bytes((SEEDS / "h264.mp4").read_bytes())
    with pytest.raises(VideoError, match="not a video file"):
        open_decoder(path)


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -1.0, 0.0])
def test_an_index_of_no_frame_rate_is_no_traceback(rate: float) -> None:
    """As a cache of indexes may hold it."""
    native = pytest.importorskip("tempsamp_fast.video.native")

    class Index:
        clock = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        frame_rate, has_times, size, coded_size, time_base, num_frames = rate, True, (64, 64), (64, 64), (1, 25), 8
        unapplied_degrees = num_restarts = num_left_out = 0
        has_false_times = False

    for sampling in (Sampling(), Sampling(mode="qwen_utils")):
        native._plan(Path("v.mp4"), sampling, (Index(), ("OK", "")), Geometry.of_family("qwen2_5_vl"), np.dtype("f4"),
                     native.Limits())  # fmt: skip
