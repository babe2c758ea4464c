"""Drawing: what must be where on the picture."""

import cv2
import numpy as np
import pytest

from jaxaccum.draw.boxes import (
    PALETTE,
    SHEET_COLOR,
    class_color,
    contact_sheet,
    draw_detections,
    encode_image,
    save_image,
)

NAMES = ("cell", "platelet")


def gray(height, width, value=90):
    return np.full((height, width, 3), value, np.uint8)


def has_color(pixels, color):
    return bool((pixels == np.array(color, np.uint8)).all(-1).any())


def test_frame_lies_on_the_box_and_nowhere_else():
    image = gray(480, 640)
    drawn = draw_detections(image, [[100, 200, 300, 400]], [1], NAMES)
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    for y, x in ((200, 150), (400, 150), (300, 100), (300, 300)):
        assert tuple(drawn[y, x]) == class_color(1)
    assert (drawn[210:390, 110:290] == 90).all()
    assert (drawn[:150] == 90).all()
    assert (drawn[410:] == 90).all()
    assert (image == 90).all(), "the input must stay as it was"


def test_label_sits_above_the_box_or_inside_at_the_upper_edge():
    low = draw_detections(gray(480, 640), [[100, 200, 300, 400]], [0], NAMES)
    assert has_color(low[185:197, 102:140], (255, 255, 255))
    high = draw_detections(gray(480, 640), [[100, 8, 300, 400]], [0], NAMES)
    assert has_color(high[8:28, 102:140], (255, 255, 255))
    assert (high[:6] == 90).all()
    corner = draw_detections(gray(480, 640), [[630, 470, 640, 480]], [1], NAMES, [0.5])
    assert has_color(corner[440:470, 540:630], class_color(1))


def test_small_images_are_enlarged_and_boxes_with_them():
    drawn = draw_detections(gray(150, 200), [[50, 60, 100, 120]], [0], NAMES)
    assert drawn.shape == (480, 640, 3)
    assert tuple(drawn[300, 160]) == class_color(0)  # x = 50 * 3.2
    assert tuple(drawn[384, 200]) == class_color(0)  # y = 120 * 3.2


def test_lines_grow_with_the_image():
    def width(side):
        drawn = draw_detections(gray(side, side), [[side // 4] * 2 + [side // 2] * 2], [0], NAMES)
        row = drawn[side * 3 // 8, : side * 3 // 8]
        return int((row == class_color(0)).all(-1).sum())

    assert width(640) >= 2
    assert width(2560) == 4 * width(640)


@pytest.mark.parametrize("scores", [[0.9, 0.3], [0.3, 0.9]])
def test_the_better_detection_lies_on_top(scores):
    box = [100, 200, 300, 400]
    drawn = draw_detections(gray(480, 640), [box, box], [0, 1], NAMES, scores)
    assert tuple(drawn[300, 100]) == class_color(int(np.argmax(scores)))


def test_boxes_beyond_the_image_are_cut():
    drawn = draw_detections(gray(480, 640), [[-50, -50, 900, 300]], [0], NAMES)
    assert tuple(drawn[300, 320]) == class_color(0)
    assert (drawn[310:] == 90).all()
    outside = draw_detections(gray(480, 640), [[700, 500, 800, 600]], [0], NAMES)
    assert (outside[:400, :500] == 90).all()


def test_without_boxes_the_image_comes_back():
    image = gray(480, 640)
    drawn = draw_detections(image, np.zeros((0, 4)), [], NAMES, [])
    assert (drawn == image).all()
    assert drawn is not image


def test_letters_stand_out_from_every_color_of_the_palette():
    assert len(set(PALETTE)) == len(PALETTE)
    names = ["name"] * len(PALETTE)
    for c, color in enumerate(PALETTE):
        plate = draw_detections(gray(480, 640), [[100, 200, 300, 400]], [c], names)[
            183:198, 102:140
        ]
        distance = np.abs(plate.astype(int) - color).sum(-1)
        assert distance.max() > 200, f"class {c}"


def test_draw_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="uint8 RGB"):
        draw_detections(np.zeros((4, 4, 3), np.float32), [], [], NAMES)
    with pytest.raises(ValueError, match="1 boxes, 2 classes"):
        draw_detections(gray(4, 4), [[0, 0, 1, 1]], [0, 1], NAMES)
    with pytest.raises(ValueError, match="2 scores"):
        draw_detections(gray(4, 4), [[0, 0, 1, 1]], [0], NAMES, [0.1, 0.2])


def test_contact_sheet_centres_images_in_equal_cells():
    sheet = contact_sheet([gray(10, 20, 1), gray(20, 10, 2), gray(20, 20, 3)], 2, gap=4)
    assert sheet.shape == (4 + 2 * 24, 4 + 2 * 24, 3)
    assert (sheet[9:19, 4:24] == 1).all()
    assert (sheet[4:24, 33:43] == 2).all()
    assert (sheet[28:48, 4:24] == 3).all()
    rest = sheet.copy()
    for rows, columns in (((9, 19), (4, 24)), ((4, 24), (33, 43)), ((28, 48), (4, 24))):
        rest[slice(*rows), slice(*columns)] = SHEET_COLOR
    assert (rest == SHEET_COLOR).all()


def test_contact_sheet_resizes_to_the_cell():
    assert contact_sheet([gray(100, 50), gray(10, 20)], 5, cell=40, gap=0).shape == (40, 80, 3)
    with pytest.raises(ValueError, match="0 images"):
        contact_sheet([], 3)


def test_saved_images_read_back_in_rgb(tmp_path):
    image = gray(5, 6)
    image[2, 3] = (255, 10, 20)
    save_image(tmp_path / "new" / "picture.png", image)
    back = cv2.imread(str(tmp_path / "new" / "picture.png"))[..., ::-1]
    assert (back == image).all()
    with pytest.raises(ValueError, match=r"format '\.xyz'"):
        encode_image(image, ".xyz")
