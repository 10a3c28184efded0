// The one screen: a photo or the camera, its mask, the exit, how sure each was, milliseconds, and sliders for thresholds and deadline.

package org.messtf.example

import android.Manifest
import android.app.Activity
import android.content.Intent
import android.content.pm.PackageManager
import android.graphics.Bitmap
import android.graphics.Canvas
import android.graphics.ImageDecoder
import android.graphics.Paint
import android.net.Uri
import android.os.Bundle
import android.view.TextureView
import android.view.View
import android.widget.Button
import android.widget.CheckBox
import android.widget.ImageView
import android.widget.LinearLayout
import android.widget.SeekBar
import android.widget.TextView
import com.google.ai.edge.litert.Environment
import com.google.ai.edge.litert.TensorBuffer
import java.util.Locale
import java.util.concurrent.Executors

class MainActivity : Activity() {
    private val worker = Executors.newSingleThreadExecutor()
    private var runner: Runner<TensorBuffer>? = null // of the worker alone
    private lateinit var camera: Camera

    // What is asked for; of the main thread alone.
    private var environment: Environment? = null
    private var photo: Bitmap? = null
    private var thresholds: MutableList<Double?>? = null
    private var deadline = Double.POSITIVE_INFINITY
    private var working = false
    private var again = false

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        setContentView(R.layout.main)
        camera = Camera(this, findViewById<TextureView>(R.id.preview)) { tell(getString(R.string.camera_failed, it)) }
        findViewById<Button>(R.id.open).setOnClickListener {
            startActivityForResult(Intent(Intent.ACTION_GET_CONTENT).setType("image/*"), OPEN)
        }
        findViewById<Button>(R.id.camera).setOnClickListener {
            if (camera.isOn) camera.close() else requestPermissions(arrayOf(Manifest.permission.CAMERA), CAMERA)
        }
        findViewById<CheckBox>(R.id.gpu).isEnabled = Environments.HAS_GPU
        findViewById<CheckBox>(R.id.gpu).setOnCheckedChangeListener { _, _ -> load() }
        findViewById<SeekBar>(R.id.deadline).setOnSeekBarChangeListener(Moved { setDeadline(it) })
        tell(getString(R.string.loading))
        val failed = { error: Exception -> tell(error.message ?: error.toString()) }
        Environments.open(this, { environment = it; load() }, failed)
    }

    override fun onPause() {
        camera.close()
        super.onPause()
    }

    override fun onDestroy() {
        worker.execute { runner?.close(); runner = null }
        worker.shutdown()
        super.onDestroy()
    }

    override fun onActivityResult(requestCode: Int, resultCode: Int, data: Intent?) {
        val uri = data?.data
        if (requestCode != OPEN || resultCode != RESULT_OK || uri == null) return
        camera.close()
        background({ decode(uri) }) { photo = it; run() }
    }

    override fun onRequestPermissionsResult(requestCode: Int, permissions: Array<String>, grantResults: IntArray) {
        if (requestCode != CAMERA) return
        if (grantResults.firstOrNull() != PackageManager.PERMISSION_GRANTED) return tell(getString(R.string.camera_failed, "not allowed"))
        camera.open()
        run()
    }

    /** Opens the bundle on the backend that is chosen. */
    private fun load() {
        val opened = environment ?: return
        val gpu = findViewById<CheckBox>(R.id.gpu).isChecked
        tell(getString(R.string.loading))
        background({
            runner?.close()
            runner = null
            LiteRtEngine.open(assets, FOLDER, opened, gpu, THREADS).also { runner = it }
        }) { made ->
            tell(getString(R.string.ready))
            if (thresholds == null) setControls(made)
            run()
        }
    }

    /** Runs what is asked for now; if something is running, after that. */
    private fun run() {
        again = true
        if (working) return
        val image = (if (camera.isOn) camera.frame() else photo) ?: return waitForFrame()
        val asked = thresholds?.toList() ?: return
        val limit = deadline
        again = false
        working = true
        background({
            val colours = IntArray(image.width * image.height)
            image.getPixels(colours, 0, image.width, 0, 0, image.width, image.height)
            val result = runner?.run(colours, image.height, image.width, asked, limit)
            result?.let { Pair(it, drawn(image, it)) }
        }) { made ->
            working = false
            if (made != null) show(made.first, made.second)
            if (again || camera.isOn) run()
        }
    }

    private fun waitForFrame() {
        if (camera.isOn) findViewById<View>(R.id.picture).postDelayed({ run() }, FRAME_MS)
    }

    /** Does something on the worker, then something with what it made on the main thread; errors are told. */
    private fun <T> background(make: () -> T, then: (T) -> Unit) = worker.execute {
        try {
            val made = make()
            runOnUiThread { then(made) }
        } catch (error: Exception) {
            runOnUiThread {
                working = false
                tell(error.message ?: error.toString())
            }
        }
    }

    /** Upright by its EXIF orientation, in memory that can be read, at most some 16 million pixels. */
    private fun decode(uri: Uri): Bitmap = ImageDecoder.decodeBitmap(ImageDecoder.createSource(contentResolver, uri)) { decoder, info, _ ->
        decoder.allocator = ImageDecoder.ALLOCATOR_SOFTWARE
        var sample = 1
        while (info.size.width / sample * (info.size.height / sample) > MOST_PIXELS) sample++
        decoder.setTargetSampleSize(sample)
    }

    /** The image under its mask. */
    private fun drawn(image: Bitmap, result: Result): Bitmap {
        val palette = checkNotNull(runner).description.palette
        val colours = IntArray(result.mask.size) { palette[result.mask[it].toInt() and 0xff] }
        val mask = Bitmap.createBitmap(colours, image.width, image.height, Bitmap.Config.ARGB_8888)
        val made = image.copy(Bitmap.Config.ARGB_8888, true)
        Canvas(made).drawBitmap(mask, 0f, 0f, Paint().apply { alpha = OPACITY })
        return made
    }

    private fun show(result: Result, picture: Bitmap) {
        findViewById<ImageView>(R.id.picture).setImageBitmap(picture)
        findViewById<TextView>(R.id.left).text = getString(R.string.left, result.exit, milliseconds(result.milliseconds))
        findViewById<TextView>(R.id.trace).text = result.trace.joinToString("\n") { step ->
            val sure = step.confidence?.let { getString(R.string.sure, percent(it)) } ?: getString(R.string.not_asked)
            val worked = step.budget?.let { ", " + getString(R.string.cells, it) } ?: ""
            "${step.exit}: $sure, ${milliseconds(step.milliseconds)}$worked"
        }
    }

    /** A slider for every threshold of the bundle, and that of the deadline up to more than all segments take. */
    private fun setControls(runner: Runner<TensorBuffer>) {
        val exits = runner.description.exits
        val asked = exits.map { it.threshold }.toMutableList()
        thresholds = asked
        val sliders = findViewById<LinearLayout>(R.id.thresholds)
        exits.forEachIndexed { index, exit ->
            val chosen = exit.threshold ?: return@forEachIndexed
            val label = TextView(this)
            label.text = getString(R.string.threshold, exit.name, percent(chosen))
            val slider = SeekBar(this)
            slider.max = STEPS
            slider.progress = Math.round(chosen * STEPS).toInt()
            slider.setOnSeekBarChangeListener(Moved {
                asked[index] = it.toDouble() / STEPS
                label.text = getString(R.string.threshold, exit.name, percent(it.toDouble() / STEPS))
                run()
            })
            sliders.addView(label)
            sliders.addView(slider)
        }
        val slider = findViewById<SeekBar>(R.id.deadline)
        slider.max = Math.ceil(1.5 * runner.fastestMilliseconds).toInt() + 1
        slider.progress = slider.max
        setDeadline(slider.max)
    }

    /** The slider's end is no deadline. */
    private fun setDeadline(value: Int) {
        val none = value == findViewById<SeekBar>(R.id.deadline).max
        deadline = if (none) Double.POSITIVE_INFINITY else value.toDouble()
        val text = if (none) getString(R.string.no_deadline) else getString(R.string.deadline, value)
        findViewById<TextView>(R.id.deadline_label).text = text
        run()
    }

    private fun tell(text: String) {
        findViewById<TextView>(R.id.status).text = text
    }

    private fun percent(share: Double) = String.format(Locale.ROOT, "%.1f %%", 100 * share)

    private fun milliseconds(value: Double) = String.format(Locale.ROOT, "%.1f ms", value)

    private class Moved(private val moved: (Int) -> Unit) : SeekBar.OnSeekBarChangeListener {
        override fun onProgressChanged(seekBar: SeekBar, progress: Int, fromUser: Boolean) {
            if (fromUser) moved(progress)
        }

        override fun onStartTrackingTouch(seekBar: SeekBar) = Unit

        override fun onStopTrackingTouch(seekBar: SeekBar) = Unit
    }

    private companion object {
        const val FOLDER = "bundle"
        const val THREADS = 4
        const val OPEN = 1
        const val CAMERA = 2
        const val STEPS = 1000
        const val OPACITY = 153
        const val FRAME_MS = 30L
        const val MOST_PIXELS = 16_000_000
    }
}
