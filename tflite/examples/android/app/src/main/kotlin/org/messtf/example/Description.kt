// What a bundle says of itself, as `export_tflite --target=android` writes it. Plain Kotlin but for org.json, which Android has.

package org.messtf.example

import org.json.JSONArray
import org.json.JSONObject

/** An exit, and the share of confident pixels from which an image leaves there, or with regions a cell of it; null where none does. */
class Exit(val name: String, val threshold: Double?)

/** Cells that leave each for itself, and the numbers of them that a segment after the first can work on, rising up to all. */
class Regions(val cells: Int, val budgets: List<Int>)

/** Names of what a signature reads and makes. */
class Signature(val inputs: List<String>, val outputs: List<String>)

/** The texts of manifest.json, and of signatures.json, since LiteRT's Kotlin does not tell the names in a file. */
class Description(manifest: String, signatures: String) {
    val height: Int
    val width: Int
    val takesBytes: Boolean
    val letterbox: Boolean
    val classes: List<String>

    /** Colours of the classes, 0xAARRGGBB. */
    val palette: IntArray
    val exits: List<Exit>

    /** Null where an image leaves as a whole. */
    val regions: Regions?

    /** By name, those of the segments. */
    val signatures: Map<String, Signature>

    init {
        val root = JSONObject(manifest)
        require(root.getInt("format") == 1) { "manifest.json: format must be 1, got ${root.getInt("format")}" }
        val input = root.getJSONObject("input")
        height = input.getInt("height")
        width = input.getInt("width")
        takesBytes = input.getString("dtype") == "uint8"
        letterbox = input.getString("resize") == "letterbox"
        classes = strings(root.getJSONArray("classes"))
        val colours = root.getJSONArray("palette")
        palette = IntArray(colours.length()) { index ->
            val colour = colours.getJSONArray(index)
            (0xff shl 24) or (colour.getInt(0) shl 16) or (colour.getInt(1) shl 8) or colour.getInt(2)
        }
        val segments = root.getJSONArray("segments")
        exits = (0 until segments.length()).map { index ->
            val segment = segments.getJSONObject(index)
            Exit(segment.getString("exit"), if (segment.isNull("theta_img")) null else segment.getDouble("theta_img"))
        }
        regions = root.optJSONObject("regions")?.let { value ->
            val grid = value.getJSONArray("grid")
            val budgets = value.getJSONArray("budgets")
            Regions(grid.getInt(0) * grid.getInt(1), (0 until budgets.length()).map { budgets.getInt(it) })
        }
        val named = JSONObject(signatures)
        this.signatures = named.keys().asSequence().associateWith { name ->
            val signature = named.getJSONObject(name)
            Signature(strings(signature.getJSONArray("inputs")), strings(signature.getJSONArray("outputs")))
        }
    }

    /** The signatures of a segment by number of cells, rising; one that can only be dense has no other budgets in the file. */
    fun forms(index: Int): Map<Int, String> {
        val whole = "segment.${exits[index].name}"
        if (regions == null || index == 0) return mapOf((regions?.cells ?: 0) to whole)
        return regions.budgets.associateWith { "$whole.$it" }.filterValues { it in signatures }
    }

    private fun strings(array: JSONArray): List<String> = (0 until array.length()).map { array.getString(it) }
}
