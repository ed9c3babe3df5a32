import base64
import hashlib
import io
import itertools
import os
import signal
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import psutil
import pytest
from hazards import encode, exif, hazards, many_scans, png_chunk, tiff, with_jpeg_segment, with_png_chunks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from raycnn.config import ImageSpec, Limits
from raycnn.errors import Bad, RaycnnError, Status
from raycnn.images import center_box, decode, pixels, random_box, read_header, whole, whole_size
from raycnn.images.isolated import Isolated

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # it warns before it fails

SPEC = ImageSpec(height=16, width=20)
GRAY_SPEC = ImageSpec(height=16, width=20, channels=1, mean=(0.5,), std=(0.5,))


def picture(height=40, width=60, channels=3):
    """A smooth gradient with a patch of noise: survives JPEG, and no two corners look alike."""
    y, x = np.mgrid[:height, :width]
    planes = (x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), (x + 2 * y) % 128)
    image = np.stack(planes, axis=-1).astype(np.uint8)
    noise = (x * 7919 ^ y * 104729) * 2654435761 >> 12
    image[: height // 4, : width // 4] = noise[: height // 4, : width // 4, None] >> np.array([0, 3, 6])
    return image[..., :channels]


HAZARDS = hazards()
LOSSLESS = {
    "png": encode(picture(), "PNG"),
    "webp": encode(picture(), "WEBP", lossless=True),
    "bmp": encode(picture(), "BMP"),
    "tiff": encode(picture(), "TIFF"),
    "tiff lzw": encode(picture(), "TIFF", compression="tiff_lzw"),
    "tiff deflate": encode(picture(), "TIFF", compression="tiff_adobe_deflate"),
}
LOSSY = {
    "jpeg": encode(picture(), "JPEG", quality=95),
    "jpeg 4:4:4": encode(picture(), "JPEG", quality=95, subsampling=0),
    "progressive jpeg": encode(picture(), "JPEG", quality=95, progressive=True),
    "rgb jpeg": encode(picture(), "JPEG", quality=95, keep_rgb=True),
    "cmyk jpeg": encode(Image.fromarray(picture()).convert("CMYK"), "JPEG", quality=95),
    "webp": encode(picture(), "WEBP", quality=95),
    "gif": encode(picture(), "GIF"),
    "tiff jpeg": encode(picture(), "TIFF", compression="jpeg"),
}
FILES = {f"lossless {name}": file for name, file in LOSSLESS.items()} | LOSSY
FILES |= {
    "gray jpeg": encode(picture(channels=1), "JPEG"),
    "gray png": encode(picture(channels=1), "PNG"),
    "1-bit png": encode(Image.fromarray(picture()).convert("1"), "PNG"),
    "palette png": encode(Image.fromarray(picture()).quantize(16), "PNG"),
    "rgba png": encode(Image.fromarray(picture()).convert("RGBA"), "PNG"),
    "16-bit png": encode(Image.fromarray(picture()[..., 0].astype(np.uint16) * 257), "PNG"),
    "float tiff": encode(Image.fromarray(picture()[..., 0].astype(np.float32) / 255), "TIFF"),
    "fax tiff": encode(Image.fromarray(picture()).convert("1"), "TIFF", compression="group4"),
    "palette bmp": encode(Image.fromarray(picture()).quantize(16), "BMP"),
    "lab tiff": encode(Image.merge("LAB", Image.fromarray(picture()).split()), "TIFF"),
}


def difference(one, other):
    return np.abs(one.astype(int) - other.astype(int))


# What is decoded


@pytest.mark.parametrize("encoded", LOSSLESS.values(), ids=LOSSLESS)
def test_lossless_formats_give_their_very_pixels(encoded):
    assert np.array_equal(decode(encoded, 3), picture())


@pytest.mark.parametrize("encoded", LOSSY.values(), ids=LOSSY)
def test_lossy_formats_give_nearly_their_pixels(encoded):
    smooth = np.s_[12:, 18:]  # beside the noise
    assert difference(decode(encoded, 3)[smooth], picture()[smooth]).mean() < 6


@pytest.mark.parametrize("encoded", FILES.values(), ids=FILES)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_header_agrees_with_the_pixels(encoded, channels):
    header, image = read_header(encoded), decode(encoded, channels)
    assert (header.height, header.width, channels) == image.shape
    assert image.dtype == np.uint8
    assert image.flags["C_CONTIGUOUS"]
    if header.channels == 1:
        assert np.array_equal(image, np.repeat(decode(encoded, 1), channels, axis=2))


def test_gray_is_asked_for_and_got_from_colour():
    luma = np.asarray(Image.fromarray(picture()).convert("L"))[..., None]
    assert np.array_equal(decode(LOSSLESS["png"], 1), luma)
    assert difference(decode(LOSSY["jpeg 4:4:4"], 1), luma)[12:, 18:].mean() < 3


def test_ycck_jpegs_of_adobe_are_not_inverted():
    inks = Image.fromarray(picture()).convert("CMYK")
    encoded = encode(inks, "JPEG", quality=95)
    assert b"Adobe" in encoded
    assert difference(decode(encoded, 3), np.asarray(inks.convert("RGB"))).mean() < 8


def test_transparent_pixels_are_white():
    alpha = np.zeros((40, 60), np.uint8)
    alpha[:, 30:] = 255
    alpha[0, 0] = 128
    image = Image.fromarray(np.dstack([picture(), alpha]))
    for encoded in (encode(image, "PNG"), encode(image, "WEBP", lossless=True, exact=True), encode(image, "TIFF")):
        got = decode(encoded, 3)
        assert (got[1:, :30] == 255).all()
        assert np.array_equal(got[:, 30:], picture()[:, 30:])
        assert difference(got[0, 0], (picture()[0, 0] + 255.0) / 2).max() <= 1
    gray = decode(encode(image.convert("LA"), "PNG"), 1)
    assert (gray[1:, :30] == 255).all()
    assert read_header(encode(image.convert("LA"), "PNG")).channels == 3


def test_a_transparent_palette_entry_or_colour_key_is_white():
    indices = np.arange(4, dtype=np.uint8).repeat(8).reshape(4, 8)
    image = Image.fromarray(indices).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 0, 0, 0])
    colours = [[10, 20, 30], [255, 255, 255], [70, 80, 90], [0, 0, 0]]
    for encoded in (encode(image, "PNG", transparency=1), encode(image, "GIF", transparency=1)):
        assert decode(encoded, 3)[:, 0].tolist() == colours
    image = Image.fromarray(np.array([[0, 7, 9]], np.uint8))
    assert decode(encode(image, "PNG", transparency=7), 1).ravel().tolist() == [0, 255, 9]
    deep = np.array([[0, 700, 65535]], np.uint16)
    assert decode(encode(Image.fromarray(deep), "PNG", transparency=700), 1).ravel().tolist() == [0, 255, 255]


def test_16_bit_samples_are_scaled_and_not_clipped():
    samples = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    expected = [0, 0, 1, 128, 255]
    assert decode(encode(Image.fromarray(samples), "PNG"), 1).ravel().tolist() == expected
    assert decode(encode(Image.fromarray(samples), "TIFF"), 1).ravel().tolist() == expected
    assert decode(tiff(samples, 16), 3)[0, :, 2].tolist() == expected
    big_endian = Image.frombytes("I;16B", (5, 1), samples.astype(">u2").tobytes())
    assert decode(encode(big_endian, "TIFF"), 1).ravel().tolist() == expected
    deep_rgb = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    deep_rgb += png_chunk(b"IDAT", zlib.compress(b"\0\x00\xff\x80\x00\xff\xff")) + png_chunk(b"IEND", b"")
    assert decode(deep_rgb, 3).ravel().tolist() == [0, 128, 255]


def test_12_bit_tiffs_use_the_whole_range_of_grays():
    packed = np.array([[0x00, 0x08, 0x00, 0xFF, 0xF0, 0x00]], np.uint8)  # 0x000, 0x800, 0xFFF, 0x000
    encoded = bytearray(tiff(packed, 12))
    encoded[10 + 8] = 4  # the width, in samples
    assert decode(bytes(encoded), 1).ravel().tolist() == [0, 128, 255, 0]


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([0, 0.5, 1], [0, 128, 255]),
        ([0, 100, 200], [0, 100, 200]),
        ([0, 32768, 65535], [0, 128, 255]),
        ([-1, 0, 1], [0, 128, 255]),
        ([1e6, 2e6, 5e6], [0, 64, 255]),
        ([0, float("nan"), 1], [0, 0, 255]),
        ([-3, -3, -3], [0, 0, 0]),
        ([-3e38, 0, float("inf")], [0, 255, 255]),
    ],
)
def test_float_samples_are_taken_for_what_their_range_says(samples, expected):
    image = Image.fromarray(np.array([samples], np.float32))
    assert decode(encode(image, "TIFF"), 1).ravel().tolist() == expected


def test_32_bit_samples_are_taken_for_what_their_range_says():
    image = Image.fromarray(np.array([[0, 1000, 65535]], np.int32))
    assert decode(encode(image, "TIFF"), 1).ravel().tolist() == [0, 4, 255]


def test_lab_becomes_rgb():
    neutral = Image.merge("LAB", [Image.new("L", (4, 4), value) for value in (255, 128, 128)])
    assert (decode(encode(neutral, "TIFF"), 3) >= 254).all()
    red = Image.merge("LAB", [Image.new("L", (4, 4), value) for value in (138, 209, 198)])  # of sRGB's (255, 0, 0)
    assert difference(decode(encode(red, "TIFF"), 3)[0, 0], np.array([255, 0, 0])).max() <= 6


# Orientation


def turned(image, orientation):
    """What a viewer shows, by the words of the EXIF standard, table 6: where stored row 0 and column 0 are."""
    rotate = {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}[orientation]  # quarter turns to the left
    image = np.rot90(image, rotate)
    return {2: image[:, ::-1], 4: image[:, ::-1], 5: image[::-1], 7: image[::-1]}.get(orientation, image)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_come_upright(form, orientation):
    options = {"WEBP": {"lossless": True}}.get(form, {})
    as_stored = decode(encode(picture(), form, **options), 3)
    encoded = encode(picture(), form, exif=exif(orientation), **options)
    upright = turned(as_stored, orientation)
    assert np.array_equal(decode(encoded, 3), upright)
    assert read_header(encoded)[1:3] == upright.shape[:2]
    choose = random_box(SPEC, np.random.default_rng(orientation))
    box = choose(*upright.shape[:2])
    rotated = pixels(encoded, SPEC, lambda height, width: box)
    plain = pixels(encode(upright, "PNG"), SPEC, lambda height, width: box)
    assert difference(rotated, plain).max() <= 1


def test_orientation_is_read_in_either_byte_order_and_wherever_the_block_stands():
    plain = encode(picture(), "JPEG")
    for order in ("<", ">"):
        block = b"Exif\0\0" + (b"II*\0" if order == "<" else b"MM\0*")
        block += struct.pack(order + "IHHHIHH", 8, 1, 0x0112, 3, 1, 6, 0) + bytes(4)
        segment = b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block
        for at in (2, 20):  # before and behind JFIF
            assert decode(plain[:at] + segment + plain[at:], 3).shape == (60, 40, 3)


@given(st.binary(max_size=60), st.sampled_from([b"", b"II*\0", b"MM\0*", b"II*\0\x08\0\0\0\x09\0"]))
@settings(max_examples=60, deadline=None)
def test_broken_exif_leaves_an_image_as_it_is_stored(noise, start):
    block = b"Exif\0\0" + start + noise.replace(b"\x12\x01", b"").replace(b"\x01\x12", b"")
    jpeg = encode(picture(), "JPEG")
    jpeg = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + jpeg[2:]
    assert decode(jpeg, 3).shape == (40, 60, 3)
    assert np.array_equal(decode(with_png_chunks(LOSSLESS["png"], png_chunk(b"eXIf", block)), 3), picture())


# What is not decoded


@pytest.mark.parametrize("encoded", [b"", None])
def test_no_bytes_are_empty(encoded):
    assert decode(encoded, 3) == pixels(encoded, SPEC) == read_header(encoded) == Bad(Status.EMPTY, "no bytes")


@pytest.mark.parametrize("name", [name for name, hazard in HAZARDS.items() if hazard.status == Status.UNSUPPORTED])
def test_what_is_not_of_an_allowed_format_is_told_by_how_it_starts(name):
    encoded = HAZARDS[name].encoded
    bad = decode(encoded, 3)
    assert repr(encoded[:8])[2:-1] in bad.detail
    assert pixels(encoded, SPEC) == read_header(encoded) == bad


@pytest.mark.parametrize("encoded", FILES.values(), ids=FILES)
def test_a_file_that_ends_early_is_truncated_wherever_it_ends(encoded):
    whole = decode(encoded, 3)
    for end in itertools.chain(range(1, 40), range(40, len(encoded), 29)):
        got = decode(encoded[:end], 3)
        if isinstance(got, Bad):
            assert got.status == Status.TRUNCATED, end
        else:  # no more than its last mark is missing
            assert end > len(encoded) - 50
            assert np.array_equal(got, whole)
    assert isinstance(decode(encoded[: len(encoded) // 2], 3), Bad)
    assert isinstance(pixels(encoded[: len(encoded) // 2], SPEC), Bad)


def test_what_follows_an_image_does_not_matter():
    for encoded in FILES.values():
        assert np.array_equal(decode(encoded + b"\0\xff<html>" * 100, 3), decode(encoded, 3))


def test_a_jpeg_that_is_damaged_inside_is_what_other_viewers_show():
    encoded = LOSSY["jpeg"]
    harmless = encoded[:-2] + b"junk before the end" + encoded[-2:]
    assert np.array_equal(decode(harmless, 3), decode(encoded, 3))
    middle = (encoded.index(b"\xff\xda") + len(encoded)) // 2
    damaged = encoded[:middle] + bytes(30) + encoded[middle + 30 :]
    assert np.array_equal(decode(damaged, 3), np.asarray(Image.open(io.BytesIO(damaged))))


def test_metadata_costs_no_image_its_pixels():
    for chunk in (
        png_chunk(b"iCCP", b"not a profile"),
        png_chunk(b"acTL", b"") + png_chunk(b"fcTL", b"\xff"),
        png_chunk(b"tEXt", b"a\0b")[:-1] + b"?",  # its checksum is wrong
    ):
        assert np.array_equal(decode(with_png_chunks(LOSSLESS["png"], chunk), 3), picture())


# Caps


@pytest.mark.parametrize("name", [name for name in HAZARDS if name.startswith("pixel-bomb")])
def test_a_small_file_of_a_huge_image_is_too_large_by_its_header(name):
    encoded = HAZARDS[name].encoded
    bad = read_header(encoded)
    assert bad == Bad(Status.TOO_LARGE, "30000 x 30000 px, the limit is 100000000 px")
    assert decode(encoded, 3) == pixels(encoded, SPEC) == bad


def test_the_caps_can_be_moved():
    for encoded in FILES.values():
        assert isinstance(read_header(encoded, Limits(max_pixels=2400)), tuple)
        assert decode(encoded, 3, Limits(max_pixels=2399)).status == Status.TOO_LARGE
        assert not isinstance(decode(encoded, 3, Limits(max_bytes=len(encoded))), Bad)
        assert decode(encoded, 3, Limits(max_bytes=len(encoded) - 1)).status == Status.TOO_LARGE


def test_a_jpeg_of_many_scans_is_not_decoded():
    encoded = FILES["progressive jpeg"]
    made = encoded.count(b"\xff\xda")
    assert np.array_equal(decode(many_scans(encoded, 100 - made), 3), decode(encoded, 3))
    bad = Bad(Status.TOO_LARGE, "JPEG: 101 scans, the limit is 100")
    bomb = many_scans(encoded, 101 - made)
    hidden = with_jpeg_segment(bomb, 0xFFFE, b"\xff\xd9")  # not the end
    for file in (bomb, bomb[:2] + b"\xff" + bomb[2:], hidden, bomb + b"\xff\xda" * 200):
        assert decode(file, 3) == pixels(file, SPEC) == read_header(file) == bad


# Whatever the bytes are


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_damage_raises_and_every_function_says_the_same(data):
    file = bytearray(data.draw(st.sampled_from(list(FILES.values()))))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, min(len(file) - 1, data.draw(st.sampled_from([40, 300, 10**6])))))
        with_what = data.draw(st.one_of(st.binary(min_size=1, max_size=4), st.sampled_from([b"\xff\xff", b"\0\0"])))
        file[at : at + data.draw(st.sampled_from([0, len(with_what), 9]))] = with_what
    encoded, limits = bytes(file), Limits(max_pixels=10**6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        header, image = read_header(encoded, limits), decode(encoded, 3, limits)
        small = pixels(encoded, SPEC, limits=limits)
    if isinstance(image, Bad):
        assert small == image
        assert image.status != Status.OK
        assert header == image or not isinstance(header, Bad)
    else:
        assert image.shape == (header.height, header.width, 3)
        assert small.shape == (16, 20, 3)


@given(st.binary(max_size=200), st.sampled_from([file[:n] for file in FILES.values() for n in (0, 4, 16)]))
@settings(max_examples=100, deadline=None)
def test_no_bytes_at_all_raise(noise, start):
    assert isinstance(decode(start + noise, 3), (Bad, np.ndarray))


# What no exception tells of

PLANTS = """
import os, signal, time, simplejpeg
decode = simplejpeg.decode_jpeg
def planted(encoded, *args, **kwargs):
    if b"planted crash" in encoded:
        os.kill(os.getpid(), signal.SIGSEGV)
    if b"planted exit" in encoded:
        os._exit(7)
    if b"planted hang" in encoded:
        time.sleep(3600)
    print("a library says something")
    return decode(encoded, *args, **kwargs)
simplejpeg.decode_jpeg = planted
"""


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Isolated processes have the plants; and start quickly, because they have no torch to resize with."""
    (tmp_path / "sitecustomize.py").write_text(PLANTS)
    resize = "from types import SimpleNamespace as N\nfrom_numpy, _C = None, N(_nn=N(_upsample_bilinear2d_aa=None))"
    (tmp_path / "torch.py").write_text(resize)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_isolated_pixels_are_those_of_the_same_process():
    large, huge = LOSSLESS["bmp"] + bytes(20 << 20), ImageSpec(height=1024, width=1024)  # more than a pipe holds
    cases = [(file, spec) for file in (LOSSY["jpeg"], LOSSLESS["png"]) for spec in (SPEC, GRAY_SPEC)] + [(large, huge)]
    with Isolated() as isolated:
        for encoded, spec in cases:
            got = isolated.pixels(encoded, spec)
            assert np.array_equal(got, pixels(encoded, spec))
            assert got.flags["WRITEABLE"]
        for encoded in (None, b"<html>", LOSSLESS["png"][:50]):
            assert isolated.pixels(encoded, SPEC) == pixels(encoded, SPEC)


@pytest.mark.slow
def test_an_image_that_crashes_or_hangs_the_decoder_costs_no_other(planted, capfd):
    good, spec = LOSSY["jpeg"], ImageSpec(height=40, width=60, crop=1)
    with Isolated(timeout_s=1) as isolated:
        for plant, said in {"crash": "signal 11 (Segmentation fault)", "exit": "exit code 7"}.items():
            assert np.array_equal(isolated.pixels(good, spec), pixels(good, spec))
            bad = isolated.pixels(good + f"planted {plant}".encode(), spec)
            assert bad == Bad(Status.CRASHED, f"decoding ended its process with {said}")
        assert isolated.pixels(good + b"planted hang", spec) == Bad(Status.TIMEOUT, "not decoded in 1 s")
        isolated.pixels(good, spec)
        (idle,) = (child for child in psutil.Process().children() if "raycnn.images.isolated" in child.cmdline())
        idle.kill()
        os.waitid(os.P_PID, idle.pid, os.WEXITED | os.WNOWAIT)  # nobody else has heard of it
        assert np.array_equal(isolated.pixels(good, spec), pixels(good, spec))
    assert capfd.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.parametrize("busy", [False, True])
def test_the_isolated_process_ends_with_the_one_that_started_it(planted, busy):
    command = [sys.executable, "-m", "raycnn.images.isolated", "0.5"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.read(14)  # it is ready
        if busy:
            header, encoded = SPEC.model_dump_json().encode(), LOSSY["jpeg"] + b"planted hang"
            child.stdin.write(struct.pack(">IQ", len(header), len(encoded)) + header + encoded)
        child.stdin.close()
        assert child.wait(20) == (-signal.SIGALRM if busy else 0)


@pytest.mark.slow
def test_what_keeps_the_isolated_process_from_starting_is_no_image(planted):
    (planted / "torch.py").write_text("raise SystemExit(9)")
    with Isolated() as isolated, pytest.raises(RaycnnError, match=r"did not start \(exit code 9\)"):
        isolated.pixels(LOSSY["jpeg"], SPEC)


# From the image to the model's input


@pytest.mark.parametrize("size", [(40, 60), (1, 1), (1, 20_000), (20_000, 1), (16, 20), (5, 7), (300, 500)])
@pytest.mark.parametrize("spec", [SPEC, GRAY_SPEC])
def test_pixels_have_the_size_of_the_models_input(size, spec):
    for encoded in (encode(picture(*size), "PNG"), encode(picture(*size), "JPEG")):
        for choose in (None, center_box(spec), random_box(spec, np.random.default_rng(0))):
            got = pixels(encoded, spec, choose)
            assert got.shape == (16, 20, spec.channels)
            assert got.dtype == np.uint8
            assert got.flags["C_CONTIGUOUS"]


@pytest.mark.parametrize("box", [(0, 0, 40, 60), (3, 5, 33, 41), (10, 20, 8, 10), (39, 0, 1, 60), (7, 9, 16, 20)])
@pytest.mark.parametrize("channels", [1, 3])
def test_resizing_is_antialiased_bilinear_as_pillows_is(box, channels):
    image = picture()[..., :channels]
    spec = SPEC if channels == 3 else GRAY_SPEC
    top, left, height, width = box
    crop = Image.fromarray(image[top : top + height, left : left + width].squeeze(axis=2 if channels == 1 else ()))
    expected = np.asarray(crop.resize((20, 16), Image.Resampling.BILINEAR)).reshape(16, 20, channels)
    assert difference(pixels(encode(image, "PNG"), spec, lambda *_: box), expected).max() <= 1


def test_an_image_of_the_models_size_is_not_touched():
    spec = ImageSpec(height=40, width=60, crop=1)
    assert np.array_equal(pixels(LOSSLESS["png"], spec), picture())


def test_a_box_that_is_not_in_the_image_is_the_callers_mistake():
    for box in ((0, 0, 41, 60), (-1, 0, 4, 4), (0, 58, 4, 4), (0, 0, 0, 5)):
        with pytest.raises(ValueError, match="not in an image of 40 x 60 px"):
            pixels(LOSSLESS["png"], SPEC, lambda *_, box=box: box)


def test_the_centre_box_is_torchvisions_resize_and_centre_crop():
    spec = ImageSpec()
    assert center_box(spec)(375, 500) == (23, 86, 328, 328)
    assert center_box(spec)(500, 375) == (86, 23, 328, 328)
    assert center_box(spec)(224, 224) == (14, 14, 196, 196)
    assert center_box(ImageSpec(crop=1))(28, 28) == (0, 0, 28, 28)
    assert center_box(ImageSpec(height=100, width=300, crop=1))(300, 300) == (100, 0, 100, 300)
    assert center_box(spec)(1, 20_000) == (0, 9999, 1, 1)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 2**32), st.sampled_from([SPEC, ImageSpec()]))
@settings(max_examples=100, deadline=None)
def test_a_random_box_lies_in_the_image_and_comes_again_from_the_same_seed(height, width, seed, spec):
    box = random_box(spec, np.random.default_rng(seed))(height, width)
    top, left, box_height, box_width = box
    assert 0 <= top < top + box_height <= height
    assert 0 <= left < left + box_width <= width
    assert random_box(spec, np.random.default_rng(seed))(height, width) == box


def test_random_boxes_vary_in_place_size_and_shape_within_their_bounds():
    choose = random_box(ImageSpec(), np.random.default_rng(0), scale=(0.25, 0.81), ratio=(0.8, 1.25))
    boxes = np.array([choose(1000, 1000) for _ in range(300)])
    shares, ratios = boxes[:, 2] * boxes[:, 3] / 1e6, boxes[:, 3] / boxes[:, 2]
    assert shares.min() == pytest.approx(0.25, abs=0.02)
    assert shares.max() == pytest.approx(0.81, abs=0.02)
    assert ratios.min() == pytest.approx(0.8, abs=0.02)
    assert ratios.max() == pytest.approx(1.25, abs=0.02)
    assert len({tuple(box) for box in boxes.tolist()}) == 300


@pytest.mark.slow
@pytest.mark.parametrize("side", [250, 500, 1000])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_smaller_with_nearly_the_same_pixels(side, orientation):
    smooth = np.asarray(Image.fromarray(picture()).resize((side * 4 // 3, side), Image.Resampling.BICUBIC))
    encoded = encode(smooth, "JPEG", quality=95, exif=exif(orientation))
    same = encode(decode(encoded, 3), "PNG")
    box = (7, 11, side * 2 // 3, side * 5 // 6)
    apart = difference(pixels(encoded, SPEC, lambda *_: box), pixels(same, SPEC, lambda *_: box))
    assert apart.mean() < 2.5
    assert apart.max() < 40
    tight = (7, 11, 60, 79)  # less than four times the model's input: nothing is left out
    assert np.array_equal(
        pixels(encode(smooth, "JPEG"), SPEC, lambda *_: tight),
        pixels(encode(decode(encode(smooth, "JPEG"), 3), "PNG"), SPEC, lambda *_: tight),
    )


@pytest.mark.parametrize(("height", "width"), [(300, 400), (400, 300), (300, 900), (900, 300), (40, 100), (1, 9)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_whole_image_keeps_its_shape_up_to_twice_its_short_side_and_is_never_enlarged(height, width, orientation):
    image = Image.fromarray(np.repeat(np.linspace(0, 255, width)[None], height, 0).astype(np.uint8))
    seen = image if orientation == 1 else image.transpose(Image.Transpose.ROTATE_270)
    made = whole(encode(image, "JPEG", quality=95, exif=exif(orientation)), 60, 1)
    assert not isinstance(made, Bad)
    short, (wide, tall) = min(height, width), seen.size
    share = min(1, 60 / short)
    assert made.shape[:2] == (round(min(tall, 2 * short) * share), round(min(wide, 2 * short) * share))
    assert made.shape[:2] == whole_size(tall, wide, 60)
    box_width, box_height = min(wide, 2 * short), min(tall, 2 * short)
    left, top = (wide - box_width) // 2, (tall - box_height) // 2
    cut = seen.crop((left, top, left + box_width, top + box_height))
    cut = cut.resize(made.shape[1::-1], Image.Resampling.BILINEAR)
    assert np.abs(made[..., 0].astype(int) - np.array(cut)).mean() < 3


def test_pixels_do_not_depend_on_the_number_of_threads():
    import torch

    encoded = encode(picture(700, 900), "PNG")
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(pixels(encoded, ImageSpec()).tobytes())
    finally:
        torch.set_num_threads(before)
    assert len(set(results)) == 1


@pytest.mark.slow
def test_reading_and_decoding_need_no_torch():
    program = """
import sys
from raycnn.config import ImageSpec
from raycnn.images import decode, pixels, read_header
encoded = sys.stdin.buffer.read()
assert read_header(encoded).channels == 3
assert decode(encoded, 3).shape == (40, 60, 3)
assert pixels(encoded, ImageSpec(height=40, width=60, crop=1)).shape == (40, 60, 3)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], input=LOSSLESS["png"], check=True)


# Golden pixels: what a model was trained on must not move


# Made from picture() by the pixel function of the first release; a JPEG's may differ between decoders.
GOLDEN_JPEG = (
    "|JeWF01!$>Nk#wx0RR9200961|JwjV01XKW3knDg3knMk4h;_zAQcl55)&sJ9v2`kDKRiEDJ?8BI!Zn>HbyrrEkIX6ModmpQ"
    "&KWMT47pHU`kO^PygEhLjevB4iga*CKVMXPc<zyPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPf"
    "t%zPf!2A01*fP7yuXp0U`hb5di}c0sq7R7ytnQ00RI30000000000000050R#sB!~h@=009F90RRI4000000000000RUe0Rj"
    ";*VG;!sQUAmM7y$qR0{{R30000000000000CA0tE;E!~h%-00II70RaF2000000000000RO90TCe*BLCU|3<CiG0ucid06ze"
    "V`BpAIKk9E>UE<tZWu9qT`uxO2DH({G<}^@e!h#I-1r!<T3g$eW8@<^*26}*WC^O&$llnEH@4<u_@S=l001C<E%jmXTD4@?!"
    "00fltv8^qaga6q"
)
GOLDEN_JPEG_PIXELS = [
    [[108, 101, 83], [100, 42, 24], [166, 31, 22], [223, 33, 29]],
    [[41, 103, 30], [93, 96, 26], [160, 95, 32], [219, 96, 38]],
    [[32, 160, 33], [94, 160, 37], [158, 162, 44], [219, 162, 50]],
    [[36, 218, 46], [95, 220, 49], [163, 220, 56], [224, 220, 62]],
]
GOLDEN_SHA256 = "2cd90819b6a47255a47377771624d53edac81825cd10edb4cde8a90b3d744915"


def test_golden_pixels_of_lossless_files():
    digest = hashlib.sha256()
    for name in ("png", "webp", "bmp", "tiff lzw"):
        digest.update(pixels(LOSSLESS[name], SPEC).tobytes())
        digest.update(pixels(LOSSLESS[name], GRAY_SPEC, lambda *_: (3, 2, 33, 57)).tobytes())
        digest.update(pixels(LOSSLESS[name], ImageSpec(height=64, width=64)).tobytes())
    assert digest.hexdigest() == GOLDEN_SHA256


def test_golden_pixels_of_a_jpeg():
    got = pixels(base64.b85decode(GOLDEN_JPEG), ImageSpec(height=4, width=4, crop=1))
    assert difference(got, np.array(GOLDEN_JPEG_PIXELS)).max() <= 2
