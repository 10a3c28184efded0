// Brings an image to a network's input as `mess_runtime.images.fit` does in Python, with the same bits.
//
// Bilinear and antialiased: a new pixel is the mean of the old ones around its centre, their weights falling linearly to 0 at a distance of
// max(1, reduction); across the width first, then across the height, each rounded to whole values; weights in units of 2**-22. Android's
// own createScaledBitmap is not antialiased: where images are larger than the network, masks and decisions would be others.

package org.messtf.example

import kotlin.math.abs
import kotlin.math.max
import kotlin.math.min

/** Rows and columns of a network's input that an image takes. */
data class Place(val top: Int, val left: Int, val height: Int, val width: Int)

object Fit {
    private const val BITS = 22
    private const val GREY = 0xff808080.toInt()

    /** Where an image of height x width lies in the input. */
    fun placed(height: Int, width: Int, inputHeight: Int, inputWidth: Int, letterbox: Boolean): Place {
        var rows = inputHeight.toLong()
        var columns = inputWidth.toLong()
        if (letterbox) { // whole numbers, rounded half up
            if (rows * width <= columns * height) {
                columns = min(columns, max(1L, (2L * width * rows + height) / (2L * height)))
            } else {
                rows = min(rows, max(1L, (2L * height * columns + width) / (2L * width)))
            }
        }
        return Place((inputHeight - rows.toInt()) / 2, (inputWidth - columns.toInt()) / 2, rows.toInt(), columns.toInt())
    }

    /** Pixels 0xAARRGGBB, as Bitmap.getPixels gives them, at the input's size, grey where they do not fill it. */
    fun fit(pixels: IntArray, height: Int, width: Int, inputHeight: Int, inputWidth: Int, letterbox: Boolean): IntArray {
        if (height == inputHeight && width == inputWidth) return pixels
        val place = placed(height, width, inputHeight, inputWidth, letterbox)
        val across = if (place.width == width) pixels else along(pixels, height, width, width, 1, place.width, place.width, 1)
        val made = if (place.height == height) across else along(across, place.width, 1, height, place.width, place.height, 1, place.width)
        val fitted = IntArray(inputHeight * inputWidth) { GREY }
        for (row in 0 until place.height) {
            made.copyInto(fitted, (place.top + row) * inputWidth + place.left, row * place.width, (row + 1) * place.width)
        }
        return fitted
    }

    /** A mask of the network at the size of the image that was fitted to it: of each pixel the class at its centre. */
    fun maskAt(mask: ByteArray, inputHeight: Int, inputWidth: Int, height: Int, width: Int, letterbox: Boolean): ByteArray {
        val place = placed(height, width, inputHeight, inputWidth, letterbox)
        val columns = IntArray(width) { place.left + nearest(place.width, width, it) }
        val made = ByteArray(height * width)
        for (row in 0 until height) {
            val line = (place.top + nearest(place.height, height, row)) * inputWidth
            for (column in 0 until width) made[row * width + column] = mask[line + columns[column]]
        }
        return made
    }

    /** The pixel of `old` in a row that the centre of pixel `position` of `new` falls into. */
    private fun nearest(old: Int, new: Int, position: Int): Int = ((2L * position + 1) * old / (2L * new)).toInt()

    /** `lines` lines of `size` pixels resized to `newSize` each; `pixel` and `line` are the steps to the next pixel and line. */
    private fun along(old: IntArray, lines: Int, line: Int, size: Int, pixel: Int, newSize: Int, newLine: Int, newPixel: Int): IntArray {
        val made = IntArray(lines * newSize)
        val scale = size.toDouble() / newSize
        val reach = max(1.0, scale)
        for (position in 0 until newSize) {
            val centre = (position + 0.5) * scale
            val first = max(0, (centre - reach + 0.5).toInt())
            val stop = min(size, (centre + reach + 0.5).toInt())
            val shares = DoubleArray(stop - first) { max(0.0, 1.0 - abs((first + it - centre + 0.5) * (1.0 / reach))) }
            var sum = 0.0
            for (share in shares) sum += share
            val weights = IntArray(shares.size) { (0.5 + shares[it] / sum * (1 shl BITS)).toInt() }
            for (each in 0 until lines) {
                var red = 1 shl (BITS - 1)
                var green = red
                var blue = red
                for (at in weights.indices) {
                    val colour = old[each * line + (first + at) * pixel]
                    red += weights[at] * (colour shr 16 and 0xff)
                    green += weights[at] * (colour shr 8 and 0xff)
                    blue += weights[at] * (colour and 0xff)
                }
                made[each * newLine + position * newPixel] =
                    (0xff shl 24) or ((red shr BITS).coerceIn(0, 255) shl 16) or ((green shr BITS).coerceIn(0, 255) shl 8) or
                    (blue shr BITS).coerceIn(0, 255)
            }
        }
        return made
    }
}
