// What a bundle says of itself, as `export_tflite --target=android` writes it. Plain Kotlin but for org.json, which Android has.

package org.messtf.example

import org.json.JSONArray
import org.json.JSONObject

/** An exit, and the share of confident pixels from which an image leaves there, null where none does. */
class Exit(val name: String, val threshold: Double?)

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
        val named = JSONObject(signatures)
        this.signatures = exits.associate { exit ->
            val signature = named.getJSONObject("segment.${exit.name}")
            exit.name to Signature(strings(signature.getJSONArray("inputs")), strings(signature.getJSONArray("outputs")))
        }
    }

    private fun strings(array: JSONArray): List<String> = (0 until array.length()).map { array.getString(it) }
}
