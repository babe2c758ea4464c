"""Pictures of what was found: boxes in images, boxes in space, clouds."""

from jaxaccum.draw.boxes import Image, contact_sheet, draw_detections, encode_image, save_image

__all__ = ["Image", "contact_sheet", "draw_detections", "encode_image", "save_image"]
