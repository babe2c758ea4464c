"""Drawing of 3D boxes: what must be where on the pictures."""

import math

import numpy as np
import pytest

from jaxaccum.draw.boxes import class_color
from jaxaccum.draw.boxes3d import (
    BACKGROUND,
    TRUTH,
    UNSEEN,
    Extent,
    birds_eye,
    corners,
    draw,
    field_of_view,
    kind_color,
    side_by_side,
)
from jaxaccum.metrics.kitti import parse

CAMERA = np.array([[700, 0, 600, 35], [0, 700, 180, 0.2], [0, 0, 1, 0.003]])
RED = class_color(0)


def label(kind="Car", x=0.0, z=20.0, yaw=0.0, y=1.6, dimensions="1.5 1.6 4", score=None):
    line = f"{kind} 0 0 0 0 0 10 10 {dimensions} {x} {y} {z} {yaw}"
    return parse(line if score is None else f"{line} {score}", "test")


def together(*texts):
    return parse("\n".join(texts), "test")


def gray(height=375, width=1242, value=90):
    return np.full((height, width, 3), value, np.uint8)


def near(pixels, color, tolerance=24):
    return (np.abs(pixels.astype(int) - color) <= tolerance).all(-1)


def project(points):
    u, v, w = CAMERA @ np.append(points, 1)
    return u / w, v / w


def test_corners_follow_the_frame_of_the_labels():
    ahead = corners(label(x=3, z=20))[0]
    np.testing.assert_allclose(ahead[:4, 0], 3 + 2)  # yaw 0 faces +x
    np.testing.assert_allclose(ahead[4:, 0], 3 - 2)
    assert {round(float(y), 5) for y in ahead[:, 1]} == {1.6, 0.1}
    assert {round(float(z), 5) for z in ahead[:, 2]} == {19.2, 20.8}
    towards = corners(label(x=3, z=20, yaw=math.pi / 2))[0]  # faces the camera
    np.testing.assert_allclose(towards[:4, 2], 18, atol=1e-5)
    assert corners(together()).shape == (0, 8, 3)


def test_edges_lie_where_the_camera_sees_them():
    image = gray()
    drawn = draw(image, label(yaw=math.pi / 2), CAMERA, text=False)
    assert (image == 90).all(), "the input must stay as it was"
    for x in (-0.8, 0.8):
        for z in (18, 22):
            u, v = project((x, 0.8, z))  # the middle of an upright edge
            assert near(drawn[int(v), int(u)], RED), (x, z)
    (left, top), (right, bottom) = project((-0.8, 0.1, 18)), project((0.8, 1.6, 18))
    margin = 4
    outside = np.ones(drawn.shape[:2], bool)
    outside[
        int(top) - margin : int(bottom) + margin + 1, int(left) - margin : int(right) + margin + 1
    ] = False
    assert (drawn[outside] == 90).all()


@pytest.mark.parametrize(("yaw", "side"), [(0, 1), (math.pi, -1)])
def test_the_front_is_tinted(yaw, side):
    # Turned a little so that both ends can be seen, and stood left of them so that none hides.
    drawn = draw(gray(), label(z=10, x=0, yaw=yaw + 0.6 * side), CAMERA, text=False)
    box = corners(label(z=10, x=0, yaw=yaw + 0.6 * side))[0]
    front = [int(p) for p in project(box[:4].mean(0))]
    back = [int(p) for p in project(box[4:].mean(0))]
    assert drawn[front[1], front[0], 0] > 110 > drawn[back[1], back[0], 0]


def test_what_is_behind_the_camera_is_cut():
    assert (draw(gray(), label(z=-5), CAMERA) == 90).all()
    # From 1 m behind the camera to 3 m before it, on its right.
    straddling = label(x=1.5, z=1, yaw=math.pi / 2, y=0.5, dimensions="1 1.6 4")
    drawn = draw(gray(), straddling, CAMERA, text=False)
    # An upright edge of the far end, and the upper edge that comes from there past the camera.
    for point in ((0.7, 0.2, 3), (0.7, -0.5, 2.5)):
        u, v = project(point)
        assert near(drawn[int(v), int(u)], RED), point
    assert (drawn[:, : int(project((0.7, 0, 3))[0]) - 4] == 90).all()


def test_nothing_is_drawn_for_areas_and_unknown_boxes():
    area = "DontCare -1 -1 -10 5 6 70 80 -1 -1 -1 -1000 -1000 -1000 -10"
    boxless = "Car 0 0 0 5 6 70 80 -1 -1 -1 -1000 -1000 -1000 -10"
    assert (draw(gray(), together(area, boxless), CAMERA) == 90).all()
    assert (birds_eye(together(area, boxless)) == birds_eye(together())).all()


def test_text_has_a_plate_of_the_class_above_the_box():
    for kind, score in (("Car", None), ("Cyclist", 0.5)):
        box = label(kind, yaw=math.pi / 2, score=score)
        plain, drawn = (draw(gray(), box, CAMERA, text=text) for text in (False, True))
        rows, columns = np.nonzero((plain != drawn).any(-1))
        _, top = project((0, 0.1, 18))
        assert rows.max() < top and rows.min() > top - 40
        assert abs((columns.min() + columns.max()) / 2 - project((0, 0, 18))[0]) < 3
        plate = drawn[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert near(plate, kind_color(kind)).mean() > 0.4


def test_plates_do_not_cover_each_other():
    row = "Car 0 0 0 0 0 10 10 1.5 1.6 4 {} 1.6 {} 1.57"
    boxes = together(*(row.format(x, z) for x, z in ((0, 20), (0.2, 25), (0, 30))))
    area = [
        (draw(gray(), part, CAMERA) != draw(gray(), part, CAMERA, text=False)).any(-1).sum()
        for part in (boxes, label(yaw=1.57))
    ]
    assert area[0] > 2.5 * area[1]


def test_the_nearer_box_lies_on_top():
    rows = [
        "Car 0 0 0 0 0 10 10 1.5 1.6 4 0 1.6 12 1.57",
        "Cyclist 0 0 0 0 0 10 10 1.5 1.6 4 0.0 1.6 16.1 1.57",
    ]
    u, v = project((-0.8, 0.8, 14))  # an edge of both
    for order in (rows, rows[::-1]):
        drawn = draw(gray(), together(*order), CAMERA, text=False)
        assert near(drawn[int(v), int(u)], RED, 60)


def test_types_have_colours_of_their_own_and_unknown_ones_that_of_misc():
    assert kind_color("Car") == class_color(0) and kind_color("Person_sitting") == class_color(7)
    assert kind_color("Dragon") == kind_color("Misc") == class_color(4)


def test_misuse_is_named():
    with pytest.raises(ValueError, match="uint8 RGB"):
        draw(np.zeros((4, 4), np.uint8), label(), CAMERA)
    with pytest.raises(ValueError, match=r"\(3, 4\) projection, got \(3, 3\)"):
        draw(gray(), label(), CAMERA[:, :3])
    with pytest.raises(ValueError, match="nothing to draw"):
        birds_eye(label(), extent=Extent(0, 0, 0, 10))


def at(picture, x, z, extent, height):
    scale = height / (extent.far - extent.near)
    return picture[int((extent.far - z) * scale), int((x - extent.left) * scale)]


def test_the_birds_eye_view_is_to_scale():
    extent = Extent(-20, 20, 0, 50)
    picture = birds_eye(label(x=5.3, z=23), extent=extent, height=500)
    assert picture.shape == (500, 400, 3)
    colored = near(picture, RED, 110) & (picture[..., 0].astype(int) - picture[..., 1] > 60)
    rows, columns = np.nonzero(colored)
    # 4 m along x, and the heading line 0.8 m beyond the front; 1.6 m along z.
    np.testing.assert_allclose(columns.min() / 10 - 20, 5.3 - 2, atol=0.25)
    np.testing.assert_allclose((columns.max() + 1) / 10 - 20, 5.3 + 2.8, atol=0.25)
    np.testing.assert_allclose(50 - (rows.max() + 1) / 10, 23 - 0.8, atol=0.25)
    np.testing.assert_allclose(50 - rows.min() / 10, 23 + 0.8, atol=0.25)


def test_truths_are_outlines_and_headings():
    extent = Extent(-20, 20, 0, 50)
    picture = birds_eye(together(), label(x=5.5, z=23, yaw=-math.pi / 2), extent=extent, height=500)
    for x, z, dark in ((4.7, 22, True), (5.5, 25.5, True), (5.5, 21.7, False), (5.1, 24, False)):
        # Within a pixel, for lines are thin.
        scale, half = 10, 1
        row, column = int((50 - z) * scale), int((x + 20) * scale)
        patch = picture[row - half : row + half + 1, column - half : column + half + 1]
        assert bool(near(patch, TRUTH, 90).any()) == dark, (x, z)


def test_what_the_camera_does_not_see_is_marked():
    view = field_of_view(CAMERA, 1242)
    np.testing.assert_allclose(view, (-600 / 700, 642 / 700))
    extent = Extent(-36, 36, -2, 70)
    picture = birds_eye(together(), extent=extent, height=360, view=view)
    for x, z, color in (
        (3, 24, BACKGROUND),
        (-27, 13, UNSEEN),
        (33, 13, UNSEEN),
        (-14, 18, BACKGROUND),
        (-18, 18, UNSEEN),
        (14, 18, BACKGROUND),
        (18, 18, UNSEEN),
        (13, -1, UNSEEN),
    ):
        assert tuple(at(picture, x, z, extent, 360)) == color, (x, z)


def test_side_by_side_holds_all_panels():
    image = gray()
    found, truth = label(yaw=1.5, score=0.7), label(z=22, yaw=1.5)
    both = side_by_side(image, found, CAMERA, truth)
    alone = side_by_side(image, found, CAMERA)
    title = alone.shape[0] - 375
    assert both.shape[0] == 2 * (375 + title)
    np.testing.assert_array_equal(alone[title:, :1242], draw(image, found, CAMERA))
    np.testing.assert_array_equal(both[375 + 2 * title :, :1242], draw(image, truth, CAMERA))
    view = field_of_view(CAMERA, 1242)
    ground = birds_eye(found, truth, height=both.shape[0] - title, view=view)
    np.testing.assert_array_equal(both[title:, -ground.shape[1] :], ground)


def test_real_boxes_meet_their_2d_boxes(shared):
    """The outline drawn for a real car must fill its labelled 2D box."""
    folder = shared / "data/detect3d/kitti/training"
    labels = parse((folder / "label_2/000007.txt").read_text(), "000007.txt")
    lines = (folder / "calib/000007.txt").read_text().splitlines()
    camera = np.array(next(x for x in lines if x.startswith("P2")).split()[1:], float).reshape(3, 4)
    index = labels.kinds.index("Car")
    one = parse((folder / "label_2/000007.txt").read_text().splitlines()[index], "000007.txt")
    drawn = draw(gray(), one, camera, text=False)
    rows, columns = np.nonzero((drawn != 90).any(-1))
    got = [columns.min(), rows.min(), columns.max(), rows.max()]
    np.testing.assert_allclose(got, one.boxes[0], atol=8)
