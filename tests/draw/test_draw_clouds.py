"""Drawing of clouds: what must be where on the picture."""

import numpy as np
import pytest

from jaxaccum.draw import clouds as draw_clouds
from jaxaccum.draw.clouds import (
    BACKGROUND,
    FRONT,
    INK,
    PARTIAL,
    PREDICTED,
    SIDE,
    TARGET,
    THREE_QUARTER,
    View,
    draw_cloud,
    draw_completion,
    frame_of,
)

RED, GREEN = (220, 30, 30), (30, 200, 30)


def box(centre=(0, 0, 0), half=(1, 1, 1), points=4000, seed=0):
    """Points in a box; dense enough for its picture to have no holes."""
    inside = np.random.default_rng(seed).uniform(-1, 1, (points, 3))
    return (inside * half + centre).astype(np.float32)


def drawn(image):
    """Where there is something else than background."""
    return (np.abs(image.astype(int) - BACKGROUND) > 8).any(-1)


def place(image):
    """Centre (x, y) of what is drawn, by the picture's side."""
    rows, columns = np.nonzero(drawn(image))
    return (columns.mean() + 0.5) / image.shape[1], (rows.mean() + 0.5) / image.shape[0]


def test_the_axes_of_the_views():
    everything = box()
    for view, offset, expected in (
        (FRONT, (0.7, 0, 0), (1, 0)),  # x to the right
        (FRONT, (0, 0.7, 0), (0, -1)),  # y up
        (SIDE, (0, 0, 0.7), (-1, 0)),  # from +x, z is to the left
        (SIDE, (0, 0.7, 0), (0, -1)),
        (View(0, 90), (0, 0, 0.7), (0, 1)),  # from above, the front is below
        (View(180, 0), (0.7, 0, 0), (-1, 0)),  # from behind
    ):
        frame = frame_of([everything], view)
        small = box(offset, (0.1, 0.1, 0.1), 200)
        x, y = place(draw_cloud(small, 128, view=view, frame=frame))
        assert np.sign([round(x - 0.5, 1), round(y - 0.5, 1)]) == pytest.approx(expected), view


def test_a_nearer_point_covers_a_farther_one_and_is_larger_on_the_picture():
    x, y = np.mgrid[-0.9:0.9:150j, -0.9:0.9:150j]  # no holes
    far, near = (np.stack([x, y, np.full_like(x, z)], -1).reshape(-1, 3) for z in (-0.9, 0.9))
    frame = frame_of([far, near], FRONT)
    areas = [drawn(draw_cloud(c, 128, view=FRONT, frame=frame)).sum() for c in (far, near)]
    assert areas[1] > 1.3 * areas[0]
    alone = draw_cloud(near, 128, colour=RED, view=FRONT, frame=frame)
    for order in ([far, near], [near, far]):
        both = draw_cloud(np.concatenate(order), 128, colour=RED, view=FRONT, frame=frame)
        assert (both[48:80, 48:80] == alone[48:80, 48:80]).all()


def test_far_points_are_paler():
    def tone(z):
        cloud = box((0, 0, z), (0.5, 0.5, 0.0))
        image = draw_cloud(cloud, 64, colour=RED, view=FRONT, frame=frame_of([box()], FRONT))
        return image[28:36, 28:36, 1].mean()  # green: 30 in the colour, 250 in the background

    assert tone(-0.9) > tone(0) + 10 > tone(0.9) + 20


def test_what_is_behind_an_edge_is_in_its_shadow():
    back = box((0, 0, -0.5), (1, 1, 0.0), 8000)
    front = box((-0.5, 0, 0.5), (0.5, 1, 0.0), 8000)
    frame = frame_of([back, front], FRONT)
    plain = draw_cloud(back, 128, colour=RED, view=FRONT, frame=frame).astype(int)
    both = draw_cloud(np.concatenate([back, front]), 128, colour=RED, view=FRONT, frame=frame)
    darker = (plain - both)[40:88, :, 0].mean(0)
    assert darker[65:67].mean() > darker[90:110].mean() + 10
    assert abs(darker[90:110].mean()) < 3


def test_the_cloud_fills_the_picture_with_a_margin():
    for cloud in (box(), box((5, -3, 2), (0.2, 1.0, 0.3)), 100 * box(half=(1, 0.1, 1))):
        for view in (THREE_QUARTER, FRONT, SIDE):
            rows, columns = np.nonzero(drawn(draw_cloud(cloud, 200, view=view)))
            extent = max(np.ptp(rows), np.ptp(columns)) / 200
            assert 0.8 < extent < 0.95, view
            assert abs((rows.min() + rows.max()) / 399 - 0.5) < 0.03
            assert abs((columns.min() + columns.max()) / 399 - 0.5) < 0.03


def test_stray_points_do_not_shrink_the_rest():
    cloud = box()
    stray = np.concatenate([cloud, [[40.0, 0, 0], [0, -90, 1], [1, 1, 1e6], [-3, 0, -1e20]]])
    for ours, theirs in zip(frame_of([stray]), frame_of([cloud]), strict=True):
        assert ours == pytest.approx(theirs, rel=0.03, abs=0.03)
    areas = [drawn(draw_cloud(points, 128)).sum() for points in (cloud, stray)]
    assert areas[1] == pytest.approx(areas[0], rel=0.05)


def test_padding_and_broken_points_are_not_drawn():
    cloud = box((0.6, 0.6, 0), (0.2, 0.2, 0.2), 500)
    extra = [[0, 0, 0], [np.nan, 0, 0], [0, np.inf, 0]]
    broken = np.concatenate([cloud, np.array(extra, np.float32)])
    assert (draw_cloud(broken, 96) == draw_cloud(cloud, 96)).all()
    for nothing in (np.zeros((0, 3)), np.zeros((5, 3)), np.full((5, 3), np.nan)):
        assert (draw_cloud(nothing, 32) == BACKGROUND).all()


def test_every_point_has_its_colour():
    """Also behind points that are not drawn, and as one colour where all have it."""
    left, right = box((-0.6, 0, 0), (0.3, 0.6, 0.3)), box((0.6, 0, 0), (0.3, 0.6, 0.3), seed=1)
    nothing = np.array([[np.nan, 0, 0], [0, 0, 0], [0.2, 0.2, 1e6]], np.float32)
    cloud = np.concatenate([nothing, left, nothing, right])
    colours = np.array([INK] * 3 + [RED] * 4000 + [INK] * 3 + [GREEN] * 4000, float)
    frame = frame_of([left, right], FRONT)
    image = draw_cloud(cloud, 128, colour=colours, view=FRONT, frame=frame).astype(int)
    plain = draw_cloud(left, 128, colour=RED, view=FRONT, frame=frame).astype(int)
    seen = drawn(plain)
    assert np.abs(image - plain)[seen].mean() < 1
    share = image[..., 1] - image[..., 0]
    assert (share[:, :64][drawn(image)[:, :64]] < 0).mean() > 0.97  # red to the left
    assert (share[:, 64:][drawn(image)[:, 64:]] > 0).mean() > 0.97
    every = draw_cloud(left, 128, colour=np.full((4000, 3), RED, float), view=FRONT, frame=frame)
    assert np.abs(every.astype(int) - plain).max() <= 1


def test_errors_are_shares_of_the_size():
    """Blue on the target, red from a twentieth of its size on."""
    target = np.array([[0, 0, 0.1], [2, 0, 0.1], [0, 1, 0.1], [np.nan] * 3, [0, 0, 0]])
    points = [[2, 0, 0.1], [2, 0.05, 0.1], [2, 0.1, 0.1], [2, 0.7, 0.1], [np.inf, 0, 0]]
    found = draw_clouds.error_colours(points, target)
    middle = (np.array(PREDICTED) + draw_clouds.WRONG) / 2
    wrong = draw_clouds.WRONG
    np.testing.assert_allclose(found[:4], [PREDICTED, middle, wrong, wrong], atol=1e-9)
    assert np.isfinite(found).all()
    three = draw_completion(points, points, target, size=32)
    four = draw_completion(points, points, target, size=32, errors=True)
    assert four.shape[1] - three.shape[1] == 34
    assert draw_completion(points, points, size=32, errors=True).shape[1] < three.shape[1]


def test_one_point_and_a_flat_cloud():
    rows, columns = np.nonzero(drawn(draw_cloud([[0.5, 0.5, 0.5]], 101)))
    assert 0 < len(rows) < 40
    assert abs(rows.mean() - 50) < 1 and abs(columns.mean() - 50) < 1
    assert drawn(draw_cloud(box(half=(1, 0, 0)), 64, view=SIDE)).any()  # a line, along the view


def test_beads_are_round_smooth_and_lit_from_above():
    bead = draw_cloud([[0.5, 0.5, 0.5]], 512, colour=RED)
    there = drawn(bead)
    rows, columns = np.nonzero(there)
    assert np.ptp(rows) == np.ptp(columns)
    assert there.sum() == pytest.approx(np.pi / 4 * (np.ptp(rows) + 1) ** 2, rel=0.2)
    edge = bead[there][:, 1]
    assert ((edge > 60) & (edge < 230)).any()  # neither bead nor background: antialiased
    middle = int(columns.mean())
    assert bead[rows.min() + 2, middle, 0] > bead[rows.max() - 2, middle, 0] + 10


def test_input_is_left_as_it_is_and_pictures_repeat():
    cloud = box()
    before = cloud.copy()
    assert (draw_cloud(cloud, 64) == draw_cloud(cloud, 64)).all()
    assert (cloud == before).all()


def hue(image, colour):
    """Share of the drawn pixels whose strongest channel is that of a colour."""
    pixels = image[drawn(image)]
    return (pixels.argmax(-1) == np.argmax(colour)).mean()


def test_a_completion_shows_input_prediction_and_target_on_one_scale():
    partial, predicted = box(half=(1, 0.5, 1)), box(half=(0.5, 0.25, 0.5), seed=1)
    target = box(half=(1, 1, 1), seed=2)
    image = draw_completion(partial, predicted, target, size=128)
    assert image.dtype == np.uint8
    assert image.shape == (128 + 20 + 4, 3 * 130 + 2, 3)
    panels = [image[2:130, 2 + 130 * i :][:, :128] for i in range(3)]
    frame = frame_of([partial, predicted, target])
    for panel, cloud, colour in zip(
        panels, (partial, predicted, target), (PARTIAL, PREDICTED, TARGET), strict=True
    ):
        assert (panel == draw_cloud(cloud, 128, colour=colour, frame=frame)).all()
        assert hue(panel, colour) > 0.9
    wide = [np.ptp(np.nonzero(drawn(panel))[1]) for panel in (panels[1], panels[2])]
    assert 0.4 < wide[0] / wide[1] < 0.55
    for i, colour in enumerate((PARTIAL, PREDICTED, TARGET)):
        caption = image[132:, 2 + 130 * i :][:, :128]
        assert (np.abs(caption.astype(int) - colour).max(-1) < 30).any()


def test_without_a_target_there_are_two_panels_and_a_title_is_a_line_above():
    partial, predicted = box(), box(seed=1)
    plain = draw_completion(partial, predicted, size=96)
    assert plain.shape == (96 + 20 + 4, 2 * 98 + 2, 3)
    titled = draw_completion(partial, predicted, size=96, title="chair")
    assert (titled[20:] == plain).all()
    assert (np.abs(titled[:20].astype(int) - INK).max(-1) < 40).any()


def test_views_are_rows():
    partial, predicted = box(half=(1, 1, 0.2)), box(half=(1, 1, 0.2), seed=1)
    image = draw_completion(partial, predicted, size=96, views=(FRONT, SIDE))
    rows = [image[2:98, :98], image[-118:-20, :98]]
    wide = [np.ptp(np.nonzero(drawn(row))[1]) for row in rows]
    assert wide[0] > 3 * wide[1]


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match=r"shape \(n, 3\), got \(4, 2\)"):
        draw_cloud(np.ones((4, 2)))
    with pytest.raises(ValueError, match="at least 1 pixel, got 0"):
        draw_cloud(box(), 0)
    with pytest.raises(ValueError, match="0 images"):
        draw_completion(box(), box(), views=())


def test_any_size():
    for size in (1, 7, 300):
        assert draw_cloud(box(), size).shape == (size, size, 3)
    assert draw_clouds.draw_completion(box(), box(), size=5).shape == (29, 16, 3)
