// Runs a bundle on Android, leaving at the first exit that is sure of the image.
//
// The exit policy is inside the graph: all that is left to an app is to compare `confident_pixels` with a number. Needs
// implementation("com.google.ai.edge.litert:litert:1.4.0") in build.gradle.kts, and model.tflite and manifest.json of a bundle among the
// assets. Not thread-safe: one MessRunner per thread.
//
//   MessRunner(context.assets, "bundle", threads = 4).use { runner ->
//       val result = runner.run(bitmap)
//       imageView.setImageBitmap(runner.colours(result))
//   }

package org.messtf.example

import android.content.res.AssetManager
import android.graphics.Bitmap
import android.graphics.Color
import android.os.SystemClock
import java.nio.ByteBuffer
import java.nio.ByteOrder
import kotlin.math.ceil
import org.json.JSONObject
import org.tensorflow.lite.Interpreter

/** One executed segment: its exit, the confident pixels where they are counted, and milliseconds. */
data class Step(val exit: String, val confidentPixels: Int?, val milliseconds: Double)

/** Class indices, one byte per pixel of the network's input, the exit that made them, and what was run. */
data class Result(val mask: ByteArray, val exit: String, val trace: List<Step>)

class MessRunner(assets: AssetManager, folder: String, threads: Int) : AutoCloseable {
    private class Exit(val name: String, val neededPixels: Int?)

    val height: Int
    val width: Int
    private val takesBytes: Boolean
    private val letterbox: Boolean
    private val palette: IntArray
    private val exits: List<Exit>
    private val interpreter: Interpreter

    // Every tensor that goes in or out, by signature and name; a feature goes from one segment to the next in the same buffer.
    private val outputs = HashMap<String, Map<String, Any>>()
    private val image: ByteBuffer

    init {
        val manifest = JSONObject(assets.open("$folder/manifest.json").bufferedReader().use { it.readText() })
        require(manifest.getInt("format") == 1) { "$folder/manifest.json: format must be 1, got ${manifest.getInt("format")}" }
        val input = manifest.getJSONObject("input")
        height = input.getInt("height")
        width = input.getInt("width")
        takesBytes = input.getString("dtype") == "uint8"
        letterbox = input.getString("resize") == "letterbox"
        val colours = manifest.getJSONArray("palette")
        palette = IntArray(colours.length()) { index ->
            val colour = colours.getJSONArray(index)
            Color.rgb(colour.getInt(0), colour.getInt(1), colour.getInt(2))
        }
        val segments = manifest.getJSONArray("segments")
        exits = (0 until segments.length()).map { index ->
            val segment = segments.getJSONObject(index)
            val theta = if (segment.isNull("theta_img")) null else segment.getDouble("theta_img")
            Exit(segment.getString("exit"), theta?.let { ceil(it * height * width - 1e-9).toInt() })
        }
        require(exits.dropLast(1).all { it.neededPixels != null }) { "$folder/manifest.json: setting must be input-dependent" }

        val bytes = assets.open("$folder/model.tflite").use { it.readBytes() }
        val model = ByteBuffer.allocateDirect(bytes.size).order(ByteOrder.nativeOrder()).put(bytes)
        model.rewind()
        interpreter = Interpreter(model, Interpreter.Options().setNumThreads(threads))
        for (exit in exits) {
            val signature = "segment.${exit.name}"
            outputs[signature] = interpreter.getSignatureOutputs(signature).associateWith { name ->
                direct(interpreter.getOutputTensorFromSignature(name, signature).numBytes())
            }
        }
        image = direct(height * width * 3 * if (takesBytes) 1 else 4)
    }

    /**
     * Segments a bitmap of any size; the mask has the network's size, and the image lies in it where [Fit.placed] says.
     *
     * The bitmap must be upright: BitmapFactory leaves photos as they are stored, ExifInterface.getRotationDegrees tells how to turn them.
     */
    fun run(bitmap: Bitmap): Result {
        val pixels = IntArray(bitmap.height * bitmap.width)
        bitmap.getPixels(pixels, 0, bitmap.width, 0, 0, bitmap.width, bitmap.height)
        fill(Fit.fit(pixels, bitmap.height, bitmap.width, height, width, letterbox))
        val tensors = HashMap<String, Any>().apply { put("image", image) }
        val trace = ArrayList<Step>()
        for (exit in exits) {
            val signature = "segment.${exit.name}"
            val made = outputs.getValue(signature)
            val inputs = interpreter.getSignatureInputs(signature).associateWith { tensors.getValue(it) }
            (inputs.values + made.values).forEach { (it as ByteBuffer).rewind() }
            val start = SystemClock.elapsedRealtimeNanos()
            interpreter.runSignature(inputs, made, signature)
            val milliseconds = (SystemClock.elapsedRealtimeNanos() - start) / 1e6
            tensors.putAll(made)
            val confident = (made["confident_pixels"] as ByteBuffer?)?.getInt(0)
            trace.add(Step(exit.name, confident, milliseconds))
            if (exit.neededPixels == null || checkNotNull(confident) >= exit.neededPixels) break
        }
        val mask = ByteArray(height * width)
        (tensors.getValue("mask") as ByteBuffer).apply { rewind() }.get(mask)
        return Result(mask, trace.last().exit, trace)
    }

    /** The mask as a picture in the bundle's colours. */
    fun colours(result: Result): Bitmap {
        val pixels = IntArray(result.mask.size) { palette[result.mask[it].toInt() and 0xff] }
        return Bitmap.createBitmap(pixels, width, height, Bitmap.Config.ARGB_8888)
    }

    override fun close() = interpreter.close()

    private fun fill(pixels: IntArray) {
        image.rewind()
        for (pixel in pixels) {
            for (channel in intArrayOf(Color.red(pixel), Color.green(pixel), Color.blue(pixel))) {
                if (takesBytes) image.put(channel.toByte()) else image.putFloat(channel.toFloat())
            }
        }
    }

    private fun direct(size: Int): ByteBuffer = ByteBuffer.allocateDirect(size).order(ByteOrder.nativeOrder())
}
