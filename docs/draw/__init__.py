"""The pictures of the docs, computed from the library's own layouts, masks and meshes."""

from docs.draw import layouts, masks, mesh, received, ring

PICTURES = {
    "layouts": layouts,
    "masks": masks,
    "mesh": mesh,
    "received": received,
    "ring": ring,
}
